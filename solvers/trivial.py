"""The bound that costs nothing: a Gram matrix is positive semi-definite."""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import CellPattern
from .problem import MaskProblem
from .rounding import gamma


def trivial_bound(problem: MaskProblem) -> Tensor:
    """A bound without any search, float64 ``[rows]``, or ``[1]`` where the rows share a budget.

    With ``s`` the `MaskProblem.negative_part` (0 where it is proven semi-definite),
    ``q^T G q >= -s sum_j G_jj q_j^2``, so that a row costs at least the least allowed sum of
    ``l_j - s w_j^2 G_jj`` over what is pruned: 0 in all usual cases.
    """
    shift = problem.negative_part()
    cost = torch.zeros(problem.shape, dtype=torch.float64, device=problem.device)
    if problem.linear is not None:
        cost += problem.linear
    if shift:
        cost -= shift * problem.weight.double().square() * problem.gram.diagonal().double()
    pattern = problem.pattern
    if isinstance(pattern, CellPattern) and bool(cost.any()):
        chosen = cost.masked_fill(pattern.lmo(-cost), 0.0)
    else:
        chosen = cost.clamp(max=0.0)
    bound = chosen.sum(dim=1) - gamma(4 + cost.numel()) * chosen.abs().sum(dim=1)
    return bound.sum().reshape(1) if pattern.coupled else bound
