"""Problems whose pattern is known by its oracle alone: the tree over the hull of its masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..clock import Clock
from ..errors import InvalidInput, NoMask
from ..hull import HullSolution, Quadratic, minimize
from ..hull.solution import HullProgress
from ..linear import Linear
from ..pattern import Pattern
from ..problem import MaskProblem
from ..rounding import gamma
from ..solution import ABSOLUTE_GAP

Floats = npt.NDArray[np.float64]


_MOST_BYTES = 2**31
"""Largest quadratic form that is made; a few copies of it are alive at a time."""


class PatternDomain:
    """What a pattern prunes, flat, as a domain of binaries for `solvers.hull.minimize`.

    The points are ``x = 1 - m`` for allowed masks m, in which the loss is a sum without
    cancellation. Their hull is reached through the pattern's bounded oracle, for `Linear` a
    mixed-integer program; `lmo_relaxed` is the oracle of the continuous relaxation.
    """

    lmo_error = 1e-9

    def __init__(self, pattern: Pattern, shape: tuple[int, int]) -> None:
        self._pattern, self._shape = pattern, shape
        self.n = shape[0] * shape[1]
        self.lower, self.upper = np.zeros(self.n), np.ones(self.n)
        self.integer = np.ones(self.n, dtype=bool)

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        """Vertex within bounds, or None."""
        return self._call(self._pattern.lmo, direction, lower, upper)

    def lmo_relaxed(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        """Vertex of the continuous relaxation within bounds, or None."""
        pattern = self._pattern
        oracle = pattern.lmo_relaxed if isinstance(pattern, Linear) else pattern.lmo
        return self._call(oracle, direction, lower, upper)

    def contains(self, x: Floats) -> bool:
        """Whether the mask ``1 - x`` is allowed."""
        return self._pattern.is_feasible(torch.from_numpy(x < 0.5).view(self._shape))

    def _call(
        self, oracle: Callable[..., Tensor], direction: Floats, lower: Floats, upper: Floats
    ) -> Floats | None:
        cost, pruned, prunable = (
            torch.from_numpy(np.ascontiguousarray(part)).view(self._shape)
            for part in (direction, lower, upper)
        )
        try:
            mask = oracle(-cost, prunable < 0.5, pruned < 0.5)
        except NoMask:
            return None
        return 1.0 - mask.double().numpy().ravel()


def solve_over_hull(
    problem: MaskProblem,
    start: Tensor,
    *,
    rel_gap: float,
    hull: bool,
    max_nodes: int | None,
    time_limit: float | None,
    watch: Callable[[HullProgress], None] | None = None,
) -> tuple[Tensor, HullSolution, float]:
    """Minimise a problem's summed loss over its pattern.

    Returns the mask (the start where rounding led to one that is not allowed), the search's answer
    in scaled units, and the unit, a power of two.

    Raises
    ------
    InvalidInput
        If the dense quadratic form would be too large.
    """
    clock = Clock(time_limit)
    rows, d = problem.shape
    size = 8 * (rows * d) ** 2
    if size > _MOST_BYTES:
        raise InvalidInput(
            f"The quadratic form of {rows} x {d} weights takes {size / 2**30:.0f} GiB; "
            f"give at most {math.isqrt(_MOST_BYTES // 8) // d} rows of {d} inputs at a time."
        )
    quadratic, linear = problem.quadratic_form()
    total = float(np.trace(quadratic) + np.abs(linear).sum())
    unit = math.ldexp(1.0, math.frexp(total)[1])
    quadratic *= 2 / unit
    linear = linear / unit
    made = _error_of_form(problem, quadratic) + _convexify(problem, quadratic, linear)
    solution = minimize(
        Quadratic(quadratic, linear),
        None,
        PatternDomain(problem.pattern, problem.shape),
        start=1.0 - start.cpu().double().numpy().ravel(),
        rel_gap=rel_gap,
        abs_gap=ABSOLUTE_GAP * float(problem.scale(start).sum()) / unit,
        time_limit=clock.limit,
        node_limit=max_nodes,
        hull=hull,
        callback=watch,
    )
    solution = replace(solution, bound=solution.bound - made)
    mask = torch.from_numpy(solution.x < 0.5).view(rows, d).to(problem.device)
    if not problem.pattern.is_feasible(mask):
        # Only an oracle's tolerance can do that; the bound does not depend on the mask.
        mask = start.clone()
    return mask, solution, unit


def _convexify(problem: MaskProblem, quadratic: Floats, linear: Floats) -> float:
    """Make ``x^T Q x / 2 + l^T x`` convex, in place, without changing it where x is binary.

    A rounded Gram matrix may have negative eigenvalues, in float32 far beyond the rounding of
    float64. With ``s`` its `negative_part`, ``(1 + s) Q_jj`` in place of ``Q_jj`` mends that, and
    ``l_j - s Q_jj / 2`` pays for it.

    Returns
    -------
    float
        By how much rounding may have changed the value of a mask.
    """
    shift = problem.negative_part()
    if not shift:
        return 0.0
    added = shift * quadratic.diagonal()
    np.fill_diagonal(quadratic, quadratic.diagonal() + added)
    linear -= added / 2
    return gamma(4) * float(quadratic.diagonal().sum() + np.abs(linear).sum())


def _error_of_form(problem: MaskProblem, quadratic: Floats) -> float:
    """How far the loss of any mask is from ``x^T Q x / 2 + l^T x``, Q the scaled form as computed.

    An entry ``w_i G_ij w_j`` is rounded twice, ``|Q_ij| <= sqrt(Q_ii Q_jj)`` up to the rounding of
    the Gram matrix, for which the factor 2 is ample; rows do not meet.
    """
    reach = np.sqrt(quadratic.diagonal().clip(min=0.0)).reshape(problem.shape).sum(axis=1)
    return 2 * gamma(3) * float(reach @ reach) / 2
