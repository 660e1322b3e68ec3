"""Multiple-choice knapsack: one option of each class, least cost for enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, vstack

from .highs import Program

_WORST = 1e4
"""Largest cost in the constraint that settles ties."""


def choose(
    costs: Sequence[Sequence[float]], amounts: Sequence[Sequence[int]], target: int
) -> list[int]:
    """One option of each class, of least summed cost, whose amounts reach the target.

    ``min sum c_lj x_lj`` subject to ``sum_j x_lj = 1`` for every class ``l`` and
    ``sum r_lj x_lj >= target``, x binary; then among its solutions the least ``sum r_lj x_lj``.
    HiGHS solves both; counts are checked in integers and costs in float64.

    Parameters
    ----------
    costs
        Finite and not negative.
    amounts
        Not negative.
    target
        To reach at least; some choice does.

    Returns
    -------
    list of int
        Index of each class's option.
    """
    owner = np.repeat(np.arange(len(costs)), [len(one) for one in costs])
    cost = np.concatenate([np.asarray(one, dtype=np.float64) for one in costs])
    counts = np.concatenate([np.asarray(one, dtype=np.int64) for one in amounts])
    unit = max(1, int(np.gcd.reduce(counts)))
    need = -(-target // unit)
    scaled = cost / (float(cost.max()) or 1.0) * _WORST
    first = _milp(scaled, owner, counts / unit, need)
    best = _total(first, cost)
    # A second program settles ties; its tolerance may let in a worse choice, which is refused.
    second = _milp(counts / unit, owner, counts / unit, need, scaled, _total(first, scaled))
    chosen = first
    if second is not None and _total(second, cost) <= best:
        chosen = second
    assert chosen is not None, "some choice reaches the target"
    if int(counts[chosen].sum()) < target:
        raise RuntimeError("HiGHS gave a choice that falls short of the target.")
    starts = np.searchsorted(owner, np.arange(len(costs)))
    return [int(index) for index in chosen - starts]


def _milp(
    objective: npt.NDArray[np.float64],
    owner: npt.NDArray[np.int64],
    amount: npt.NDArray[np.float64],
    need: int,
    cost: npt.NDArray[np.float64] | None = None,
    limit: float = math.inf,
) -> npt.NDArray[np.int64] | None:
    """Indices of the chosen options, class by class; None if there is no choice."""
    options = np.arange(len(owner))
    classes = int(owner[-1]) + 1
    rows = [csr_array((np.ones(len(owner)), (owner, options))), csr_array(amount[None])]
    least, most = [*np.ones(classes), need], [*np.ones(classes), math.inf]
    if cost is not None:
        rows.append(csr_array(cost[None]))
        least, most = [*least, -math.inf], [*most, limit]
    program = Program(csr_array(vstack(rows)), np.array(least), np.array(most))
    found = program.minimise(objective, np.zeros(len(owner)), np.ones(len(owner)))
    if found is None:
        return None
    chosen = np.flatnonzero(found > 0.5)
    if not np.array_equal(owner[chosen], np.unique(owner)):
        raise RuntimeError("HiGHS gave a choice without exactly one option per class.")
    return chosen


def _total(chosen: npt.NDArray[np.int64] | None, values: npt.NDArray[np.float64]) -> float:
    return math.inf if chosen is None else math.fsum(values[chosen])
