"""Bounds of a layer whose rows share one budget, row by row (Lagrangian decomposition).

With S weights to prune in the layer, any price ``lambda`` of a pruned weight gives

    min { sum_r f_r(x_r) : sum_r 1^T x_r = S } >= lambda S + sum_r min_x f_r(x) - lambda 1^T x,

where x is free of counts on the right; each of these minima is bounded by its own semidefinite
dual. The right-hand side is concave in the price, with slope S minus the minimisers' counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..clock import Clock
from ..problem import MaskProblem
from ..rounding import gamma
from .ascent import THREADS_PAY_FROM, Bounded, Effort, strengthen
from .cuts import Array
from .program import BinaryProgram

_EVALUATIONS = 6
_ROUNDS = 12
"""Of the dual ascent on a row while the price is looked for."""

_NEAR = 0.02
"""The price is good when the counts are off by this share."""


def threads(problem: MaskProblem) -> int:
    """How many rows are bounded side by side."""
    return torch.get_num_threads() if problem.shape[1] < THREADS_PAY_FROM else 1


def bound_row(
    problem: MaskProblem,
    mask: Tensor,
    row: int,
    price: float,
    mean: float,
    rel_gap: float,
    effort: Effort,
    relaxed: Array | None = None,
) -> tuple[BinaryProgram, Bounded]:
    """Bound ``f_r(x) - price 1^T x`` over all binary x of a row.

    Parameters
    ----------
    mask
        Bool ``[rows, d]``, the incumbent.
    mean
        Mean loss of a row, against which gaps are measured.
    rel_gap, effort
        When to stop.
    relaxed
        Where the layer's plain relaxation is about least, the part of this row, ``[d]``.
    """
    program = BinaryProgram.priced(problem, row, price)
    target = program.objective((~mask[row]).double().cpu().numpy())
    # The priced loss may be near 0, so its gap is measured against the row's own loss.
    share = mean / max(abs(target), 1e-300)
    effort = replace(effort, triangles_above=effort.triangles_above * share)
    found = strengthen(program, target, effort, rel_gap=rel_gap * share, relaxed=relaxed)
    return program, found


def marginal_prices(problem: MaskProblem, mask: Tensor) -> tuple[float, float]:
    """What reviving the worst pruned weight saves, and what pruning the cheapest kept one costs.

    The price lies between them where the mask is optimal and both exist; equal if only one does.
    """
    weight, gram = problem.weight.double(), problem.gram.double()
    pruned = weight.masked_fill(mask, 0.0)
    slope = 2 * weight * (pruned @ gram)
    if problem.linear is not None:
        slope = slope + problem.linear
    own = weight**2 * gram.diagonal()
    saves, costs = (slope - own)[~mask], (slope + own)[mask]
    if len(saves) == 0 or len(costs) == 0:
        only = float(costs.min()) if len(costs) else float(saves.max())
        return only, only
    return float(saves.max()), float(costs.min())


def fitted_price(
    problem: MaskProblem,
    mask: Tensor,
    pilot: Sequence[int],
    clock: Clock,
) -> float:
    """A price at which the relaxed counts of some rows are those of a mask.

    Begins between the marginal prices of the mask and closes in on the root of the counts, which
    rise with the price. Any price is valid; this one is about the best.

    Parameters
    ----------
    problem, mask
        The layer, and the best mask known, bool ``[rows, d]``.
    pilot
        Rows whose duals are tried.
    clock
        For all of it.
    """
    low, high = sorted(marginal_prices(problem, mask))
    price = (low + high) / 2
    mean = float(problem.objective(mask).sum()) / len(mask)
    step = max(high - low, 0.1 * abs(price), 1e-3 * abs(mean))
    wanted = float((~mask[list(pilot)]).sum())
    workers = threads(problem)
    turns = _EVALUATIONS * -(-len(pilot) // workers)
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    best_value, best = -np.inf, price
    most = clock.remaining / turns
    for _ in range(_EVALUATIONS):

        def priced(row: int, price: float = price) -> Bounded:
            effort = Effort(_ROUNDS, clock.part(1.0, most), 0.02, triangles_above=np.inf)
            return bound_row(problem, mask, row, price, mean, 1e-3, effort)[1]

        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(priced, pilot))
        value = price * wanted + sum(one.bound for one in found)
        if value > best_value:
            best_value, best = value, price
        excess = sum(float(one.relaxed.sum()) for one in found) - wanted
        if clock.expired or abs(excess) <= _NEAR * max(wanted, 1.0):
            break
        if excess > 0:
            above = (price, excess)
        else:
            below = (price, excess)
        if below is None or above is None:
            price = price - step if above is not None else price + step
            step *= 2
        else:
            share = -below[1] / (above[1] - below[1])
            price = below[0] + min(max(share, 0.1), 0.9) * (above[0] - below[0])
    return best


def layer_bound(pruned: int, price: float, bounds: Sequence[float]) -> float:
    """What priced rows prove of the layer: ``sum of bounds + price * pruned``, rounded down.

    Parameters
    ----------
    pruned
        S, the weights that every allowed mask prunes.
    price, bounds
        ``lambda``, and of every row a bound on ``f_r(x) - lambda 1^T x``.
    """
    paid = price * pruned
    terms = math.fsum(abs(bound) for bound in bounds) + abs(paid)
    return math.fsum([*bounds, paid]) - gamma(4) * terms
