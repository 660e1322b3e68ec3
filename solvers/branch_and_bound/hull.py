"""Problems whose pattern is known by its oracle alone: the tree over the hull of its masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import InvalidInput
from ..hull import HullSolution, Quadratic, minimize
from ..hull.solution import HullProgress
from ..linear import Linear
from ..pattern import Pattern
from ..problem import MaskProblem

Floats = npt.NDArray[np.float64]


class PatternDomain:
    """A pattern's masks, flat, as a domain of binaries for `solvers.hull.minimize`.

    Its hull is reached through the pattern's bounded oracle, for `Linear` a mixed-integer
    program; `lmo_relaxed` is the oracle of the continuous relaxation.
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

    def _call(
        self, oracle: Callable[..., Tensor], direction: Floats, lower: Floats, upper: Floats
    ) -> Floats | None:
        cost, low, high = (
            torch.from_numpy(np.ascontiguousarray(part)).view(self._shape)
            for part in (direction, lower, upper)
        )
        try:
            vertex = oracle(cost, low > 0.5, high > 0.5)
        except InvalidInput:  # the bounds leave no mask
            return None
        return vertex.double().numpy().ravel()


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

    Returns the mask, the search's answer in scaled units, and the unit.
    """
    rows, d = problem.shape
    quadratic, linear = problem.quadratic_form()
    unit = float(np.trace(quadratic) + np.abs(linear).sum()) or 1.0
    quadratic, linear = quadratic / unit, linear / unit
    row_sums = quadratic.sum(axis=1)
    loss = Quadratic(2 * quadratic, -2 * row_sums - linear, float(row_sums.sum() + linear.sum()))
    solution = minimize(
        loss,
        None,
        PatternDomain(problem.pattern, problem.shape),
        start=start.cpu().double().numpy().ravel(),
        rel_gap=rel_gap,
        abs_gap=0.0,
        time_limit=time_limit,
        node_limit=max_nodes,
        hull=hull,
        callback=watch,
    )
    mask = torch.from_numpy(solution.x > 0.5).view(rows, d).to(problem.device)
    return mask, solution, unit
