"""Feasible points from a node's relaxed point."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np

from .domain import Floats
from .node import FrankWolfe, Inheritance
from .objective import Objective
from .oracle import Oracle

Heuristic = Literal["rounding", "nearest", "gradient"]

HEURISTICS: tuple[Heuristic, ...] = ("rounding", "nearest", "gradient")

_GRADIENT_STEPS = 5

_POLISH_ITERATIONS = 50
_POLISH_ACCURACY = 1e-3


class Heuristics:
    """Tries to turn relaxed points into feasible ones, never the same one twice.

    "rounding" rounds the relaxed point; "nearest" asks the oracle for a whole point near the
    rounded one (direction ``lower + upper - 2 round(x)``); "gradient" follows the gradient from
    oracle answer to oracle answer. Continuous variables are then optimised by Frank-Wolfe.

    Parameters
    ----------
    names
        Which of them to use.
    objective, oracle, frank_wolfe
        Shared by the whole tree.
    """

    def __init__(
        self,
        names: Collection[Heuristic],
        objective: Objective,
        oracle: Oracle,
        frank_wolfe: FrankWolfe,
    ) -> None:
        self._names = names
        self._objective, self._oracle, self._frank_wolfe = objective, oracle, frank_wolfe
        self._tried: set[bytes] = set()

    def run(self, x: Floats, gradient: Floats, lower: Floats, upper: Floats) -> None:
        """Offer what can be found near ``x`` ``[n]`` under a node's bounds."""
        if "rounding" in self._names:
            self.round(x, gradient, lower, upper)
        if "nearest" in self._names:
            direction = lower + upper - 2 * np.rint(x)
            self._take(self._oracle.feasible(direction, lower, upper), lower, upper)
        if "gradient" in self._names:
            self._follow(gradient, lower, upper)

    def round(self, x: Floats, gradient: Floats, lower: Floats, upper: Floats) -> None:
        """Fix the integer variables at ``x`` rounded, if that is feasible."""
        low, up = self._oracle.fixed(x, lower, upper)
        if self._is_new(low, up):
            point = self._oracle.feasible(gradient, low, up)
            if point is not None:
                self._polish(point, low, up)

    def _follow(self, gradient: Floats, lower: Floats, upper: Floats) -> None:
        for _ in range(_GRADIENT_STEPS):
            point = self._oracle.feasible(gradient, lower, upper)
            if point is None or not self._take(point, lower, upper):
                return
            gradient = self._objective.gradient(point)

    def _take(self, point: Floats | None, lower: Floats, upper: Floats) -> bool:
        """Offer an oracle's answer; False if there is none or it is not new."""
        if point is None:
            return False
        low, up = self._oracle.fixed(point, lower, upper)
        if not self._is_new(low, up):
            return False
        self._polish(point, low, up)
        return True

    def _is_new(self, lower: Floats, upper: Floats) -> bool:
        key = lower.tobytes() + upper.tobytes()
        new = key not in self._tried
        self._tried.add(key)
        return new

    def _polish(self, point: Floats, lower: Floats, upper: Floats) -> None:
        """Offer a point, and the best values of its continuous variables."""
        self._frank_wolfe.harvest(point)
        if self._oracle.pure:
            return
        start = Inheritance([point], np.ones(1), np.zeros(len(point)))
        active = self._frank_wolfe.begin(start, lower, upper)
        if active is None:
            return
        relaxed = self._frank_wolfe.solve(
            active,
            lower,
            upper,
            -np.inf,
            accuracy=_POLISH_ACCURACY,
            max_iterations=_POLISH_ITERATIONS,
        )
        # Rounding errors of the weights aside, the integer variables of all points are equal.
        self._frank_wolfe.harvest(np.where(lower == upper, lower, relaxed.x))
