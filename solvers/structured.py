"""Structured pruning: whole inputs, neurons or heads, as a problem with one row.

Removing group ``k`` removes its inputs from every output at once. With
``E = G * (W^T W)`` (entrywise) and ``P [groups, d]`` summing the inputs of each group, the
layer's output changes by

    sum_r (w_r * P^T x)^T G (w_r * P^T x) = x^T (P E P^T) x,    x = 1 - m per group

which is a `MaskProblem` with one row, weight 1 and Gram matrix ``P E P^T``. A mask of that
problem has one entry per group; `expand` gives the layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidInput
from .linear import Linear
from .pattern import Pattern, PerRow
from .problem import ArrayLike, MaskProblem


def input_groups(
    weight: ArrayLike, gram: ArrayLike, groups: int | ArrayLike, pattern: Pattern
) -> MaskProblem:
    """Which groups of a layer's inputs to keep.

    Parameters
    ----------
    weight
        ``[rows, d]``, as for `MaskProblem`.
    gram
        ``[d, d]`` of the layer's inputs.
    groups
        Group of each input, integers ``[d]`` in 0..K-1 without a gap; or the size of groups of
        consecutive inputs.
    pattern
        The allowed masks, of shape ``(1, K)``.

    Returns
    -------
    MaskProblem
        One row of K groups, float64, whose objective is the squared change of the layer's
        outputs per token.

    Raises
    ------
    InvalidInput
        If the layer is not a valid one, or a group is empty, or the pattern does not fit.
    """
    layer = MaskProblem(weight, gram, PerRow(keep=0))
    group = _group_of_each(groups, layer.shape[1]).to(layer.device)
    count = int(group.max()) + 1

    dense = layer.weight.double()
    inputs = layer.gram.double() * (dense.T @ dense)
    by_row = inputs.new_zeros(count, len(group)).index_add_(0, group, inputs)
    summed = by_row.new_zeros(count, count).index_add_(1, group, by_row)

    # sum_ij |E_ij| in a group, at most; a diagonal below its rounding errors is zero.
    size = inputs.new_zeros(count).index_add_(0, group, inputs.diagonal().sqrt()).square()
    dead = summed.diagonal() <= 64 * torch.finfo(layer.gram.dtype).eps * size
    summed[dead] = 0.0
    summed[:, dead] = 0.0
    return MaskProblem(summed.new_ones(1, count), (summed + summed.T) / 2, pattern)


def input_channels(weight: ArrayLike, gram: ArrayLike, pattern: Pattern) -> MaskProblem:
    """Which single inputs of a layer to keep; see `input_groups`."""
    return input_groups(weight, gram, 1, pattern)


def neurons(down_weight: ArrayLike, gram: ArrayLike, pattern: Pattern) -> MaskProblem:
    """Which neurons of an MLP to keep: the inputs of its down projection ``[hidden, neurons]``."""
    return input_channels(down_weight, gram, pattern)


def attention_heads(
    out_weight: ArrayLike, gram: ArrayLike, head_dim: int, pattern: Pattern
) -> MaskProblem:
    """Which heads to keep: groups of ``head_dim`` inputs of the output projection.

    Parameters
    ----------
    out_weight
        ``[hidden, heads * head_dim]``.
    gram
        ``[heads * head_dim, heads * head_dim]`` of the concatenated heads.
    head_dim
        Inputs per head.
    pattern
        The allowed masks, of shape ``(1, heads)``.
    """
    return input_groups(out_weight, gram, head_dim, pattern)


def expand(mask: ArrayLike, groups: int | ArrayLike, rows: int = 1) -> Tensor:
    """The layer's mask, bool ``[rows, d]``, from one over groups, bool ``[1, K]``.

    ``groups`` as for `input_groups`.
    """
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != 1:
        raise InvalidInput(
            f"A mask over groups must be boolean [1, groups], not {mask.dtype} {tuple(mask.shape)}."
        )
    count = mask.shape[1]
    d = groups * count if isinstance(groups, int) else len(groups)
    group = _group_of_each(groups, d).to(mask.device)
    if int(group.max()) + 1 != count:
        raise InvalidInput(f"The mask has {count} groups where {int(group.max()) + 1} are named.")
    return mask[:, group].repeat(rows, 1)


def parameter_budget(
    costs: ArrayLike,
    budget: float,
    *,
    at_least: Mapping[str, tuple[Sequence[int], int]] | None = None,
) -> Linear:
    """Keep groups whose costs sum to at most ``budget``.

    Parameters
    ----------
    costs
        ``[K]``, non-negative: parameters (or bytes, or operations) of each group.
    budget
        In the same unit.
    at_least
        Lower bounds on counts, by a name for messages: ``{"block 0": ([0, 1, 2], 1)}`` keeps at
        least one of the groups 0, 1 and 2.

    Raises
    ------
    InvalidInput
        If a cost is negative, an index is out of range or no mask satisfies everything.

    Examples
    --------
    >>> import torch
    >>> from solvers.structured import parameter_budget
    >>> heads = parameter_budget([4.0, 3.0, 2.0], 5.0, at_least={"block 0": ([0, 1], 1)})
    >>> heads.lmo(torch.tensor([[-3.0, -2.0, -2.0]]))
    tensor([[False,  True,  True]])
    """
    cost = torch.as_tensor(costs).detach().cpu().double().numpy()
    if cost.ndim != 1 or len(cost) == 0 or not (cost >= 0).all():
        raise InvalidInput("The costs must be non-negative numbers, one per group.")
    matrix, lower, upper, names = [cost], [-np.inf], [float(budget)], ["the budget"]
    for name, (index, minimum) in (at_least or {}).items():
        chosen = np.asarray(index, dtype=np.int64)
        if chosen.ndim != 1 or not ((chosen >= 0) & (chosen < len(cost))).all():
            raise InvalidInput(f"{name} names groups outside 0..{len(cost) - 1}.")
        counted = np.zeros(len(cost))
        counted[chosen] = 1.0
        matrix.append(counted)
        lower.append(float(minimum))
        upper.append(np.inf)
        names.append(name)
    return Linear(np.stack(matrix), lower, upper, names=names)


def _group_of_each(groups: int | ArrayLike, d: int) -> Tensor:
    """Group of each of ``d`` inputs, long ``[d]``, or `InvalidInput`."""
    if isinstance(groups, int):
        if groups < 1 or d % groups:
            raise InvalidInput(
                f"Groups of {groups} inputs do not divide a layer of {d} inputs evenly."
            )
        return torch.arange(d) // groups
    group = torch.as_tensor(groups)
    if group.shape != (d,) or group.is_floating_point() or group.dtype == torch.bool:
        raise InvalidInput(
            f"The groups have shape {tuple(group.shape)} and type {group.dtype}; "
            f"give one integer for each of {d} inputs."
        )
    group = group.long()
    if int(group.min()) < 0:
        raise InvalidInput(f"Group {int(group.min())} is negative; number groups from 0.")
    present = set(group.tolist())
    missing = next((k for k in range(len(present)) if k not in present), None)
    if missing is not None:
        raise InvalidInput(f"Group {missing} has no input; number groups from 0 without a gap.")
    return group
