"""Nodes of the tree, and Frank-Wolfe over what a node leaves of the hull.

Blended pairwise steps (Tsuji, Tanaka, Pokutta, arXiv 2110.12650) or away steps, lazified as in
Boscia (arXiv 2208.11010): known points are used as long as they promise a fair share of the last
gap that the oracle has confirmed.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..clock import Clock
from ..rounding import gamma
from .active_set import ActiveSet, inside
from .domain import Floats
from .incumbent import Incumbent
from .objective import Objective
from .oracle import Oracle

Variant = Literal["corrective", "blended_pairwise", "away"]

VARIANTS: tuple[Variant, ...] = ("corrective", "blended_pairwise", "away")


@dataclass(frozen=True)
class Inheritance:
    """What children get from their parent: points, their weights, and the last gradient."""

    points: list[Floats]
    weights: Floats
    gradient: Floats


@dataclass(frozen=True)
class Branching:
    """How a node came about: variable, direction, how far it moved, and the parent's bound."""

    variable: int
    up: bool
    distance: float
    parent_bound: float


@dataclass
class Node:
    """A box of the tree that is still to be solved.

    Attributes
    ----------
    lower, upper
        Float64 ``[n]``.
    bound
        No feasible point in the box has a smaller value in exact arithmetic (unless the best
        point so far is as good).
    """

    lower: Floats
    upper: Floats
    bound: float
    depth: int
    inherited: Inheritance
    branching: Branching | None = None


class End(enum.Enum):
    """Why Frank-Wolfe stopped."""

    ACCURATE = enum.auto()
    PRUNED = enum.auto()
    EXHAUSTED = enum.auto()
    TIME = enum.auto()


@dataclass(frozen=True)
class Relaxed:
    """Where Frank-Wolfe stopped: the point, its value and gradient, and the node's bound."""

    x: Floats
    value: float
    gradient: Floats
    bound: float
    end: End


class FrankWolfe:
    """Minimises the objective over a node, as accurately as the tree needs.

    Parameters
    ----------
    objective, oracle, incumbent, clock
        Shared by the whole tree; feasible points that the oracle answers are offered.
    variant
        Steps on the active set.
    lazy
        Whether to try known points before the oracle.
    lazy_tolerance
        A known point is used if it promises the last gap divided by this.
    strong_convexity
        ``mu`` with ``f - mu |x|^2 / 2`` convex.
    """

    def __init__(
        self,
        objective: Objective,
        oracle: Oracle,
        incumbent: Incumbent,
        clock: Clock,
        *,
        variant: Variant,
        lazy: bool,
        lazy_tolerance: float,
        strong_convexity: float,
    ) -> None:
        self._objective, self._oracle = objective, oracle
        self._incumbent, self._clock = incumbent, clock
        self._variant, self._lazy, self._lazy_tolerance = variant, lazy, lazy_tolerance
        self._strong_convexity = strong_convexity
        self.iterations = self.lazy_iterations = 0

    def begin(self, inherited: Inheritance, lower: Floats, upper: Floats) -> ActiveSet | None:
        """The inherited points inside the bounds, or the oracle's; None if there are none."""
        keep = inside(np.array(inherited.points), lower, upper)
        points = [p for p, kept in zip(inherited.points, keep, strict=True) if kept]
        weights = inherited.weights[keep]
        if not points:
            point = self._oracle.node(inherited.gradient, lower, upper)
            if point is None:
                return None
            self.harvest(point)
            points, weights = [point], np.ones(1)
        elif not weights.any():
            best = int((np.array(points) @ inherited.gradient).argmin())
            weights = np.zeros(len(points))
            weights[best] = 1
        return ActiveSet(points, weights)

    def harvest(self, point: Floats) -> float:
        """Value of a point, which is offered as incumbent if it is whole."""
        value = self._objective.value(point)
        if self._oracle.is_whole(point):
            self._incumbent.offer(point, value)
        return value

    def solve(
        self,
        active: ActiveSet,
        lower: Floats,
        upper: Floats,
        bound: float,
        *,
        accuracy: float,
        max_iterations: int,
    ) -> Relaxed:
        """Minimise until the node can be given up or is known accurately.

        Parameters
        ----------
        active
            Where to begin; changed in place.
        lower, upper
            The node's bounds, float64 ``[n]``.
        bound
            What is already known to be below the node's optimum.
        accuracy
            Stop when the Frank-Wolfe gap is this share of the distance between the best value
            known and the node's bound.
        max_iterations
            Steps at most.
        """
        estimate = math.inf
        stuck = False
        for iteration in range(max_iterations + 1):
            x = active.x
            gradient = self._objective.gradient(x)
            scores = active.scores(gradient)
            here = float(gradient @ x)
            if iteration == 0:
                estimate = float(scores[active.worst(scores)] - scores.min())
            last = stuck or iteration == max_iterations
            if self._lazy and not last and estimate > 0:
                threshold = estimate / self._lazy_tolerance
                if self._local(active, x, gradient, scores, here, threshold):
                    self.lazy_iterations += 1
                    stuck = np.array_equal(active.x, x)
                    continue
            vertex = self._oracle.node(gradient, lower, upper)
            if vertex is None:  # a tolerance apart from the points that it once answered
                return Relaxed(x, math.inf, gradient, math.inf, End.PRUNED)
            value = self._objective.value(x)
            gap, guard = self._gap(x, value, gradient, vertex, lower, upper)
            bound = max(bound, value - max(gap, 0.0) - guard + self._lift(x))
            at = self.harvest(vertex)
            self._objective.check_tangent(x, value, gradient, vertex, at)
            if bound >= self._incumbent.cutoff:
                return Relaxed(x, value, gradient, bound, End.PRUNED)
            if gap <= accuracy * (self._incumbent.value - value + gap) and math.isfinite(
                self._incumbent.value
            ):
                return Relaxed(x, value, gradient, bound, End.ACCURATE)
            if last or gap <= guard:
                return Relaxed(x, value, gradient, bound, End.EXHAUSTED)
            if self._clock.expired:
                return Relaxed(x, value, gradient, bound, End.TIME)
            estimate = gap
            if not self._lazy and self._local(active, x, gradient, scores, here, gap):
                stuck = np.array_equal(active.x, x)
                continue
            known = int(scores.argmin())
            index = known if np.array_equal(active.matrix[known], vertex) else active.add(vertex)
            self._towards(active, x, gradient, index)
            stuck = np.array_equal(active.x, x)
        raise AssertionError("the last iteration returns")

    def bound_over_box(self, x: Floats, lower: Floats, upper: Floats) -> float:
        """What the tangent in ``x`` says of all points within bounds, whatever the domain."""
        value, gradient = self._objective.value(x), self._objective.gradient(x)
        lowest = np.where(gradient > 0, lower, upper)
        gap, guard = self._gap(x, value, gradient, lowest, lower, upper)
        return value - gap - guard

    def below(self, value: float, x: Floats) -> float:
        """A lower bound on ``f(x)`` in exact arithmetic, from its computed value."""
        return value - self._objective.value_error(x, value)

    def tangent_error(self, relaxed: Relaxed, lower: Floats, upper: Floats) -> float:
        """How far above the function the tangent that Frank-Wolfe ended with may be."""
        return self._objective.tangent_error(
            relaxed.x, relaxed.value, relaxed.gradient, lower, upper
        )

    def _gap(
        self,
        x: Floats,
        value: float,
        gradient: Floats,
        vertex: Floats,
        lower: Floats,
        upper: Floats,
    ) -> tuple[float, float]:
        """``<g, x - v>``, and what errors may have added to ``f(x) - <g, x - v>`` as a bound.

        For the computed ``g`` and every feasible ``y`` within the bounds,
        ``f(y) >= f(x) + <g, y - x> - e``, e the error of the tangent, and
        ``<g, y> >= <g, v> - r max_j |g_j|``, r the oracle's error as a share of the largest cost.
        ``<g, x - v>`` itself is a difference, a product and a sum of n of them.
        """
        change = gradient * (x - vertex)
        gap = float(change.sum())
        error = self._objective.tangent_error(x, value, gradient, lower, upper)
        error += self._oracle.error * float(np.abs(gradient).max())
        error += gamma(len(x) + 8) * (abs(value) + float(np.abs(change).sum()))
        return gap, 1.001 * error

    def _local(
        self,
        active: ActiveSet,
        x: Floats,
        gradient: Floats,
        scores: Floats,
        here: float,
        threshold: float,
    ) -> bool:
        """Make a step that needs no oracle; False if none promises ``threshold``."""
        worst, best = active.worst(scores), active.best(scores)
        if self._variant != "away":
            if scores[worst] - scores[best] >= threshold:
                if not self._correct(active, gradient):
                    self._pairwise(active, x, gradient, worst, best)
                return True
        elif max(scores[worst] - here, here - scores[best]) >= threshold:
            if scores[worst] - here > here - scores[best]:
                self._away(active, x, gradient, worst)
            else:
                self._towards(active, x, gradient, best)
            return True
        if self._lazy:
            best = int(scores.argmin())
            if here - scores[best] >= threshold:
                self._towards(active, x, gradient, best)
                return True
        return False

    def _correct(self, active: ActiveSet, gradient: Floats) -> bool:
        if self._variant != "corrective" or not self._objective.quadratic:
            return False
        self.iterations += 1
        return active.correct(gradient, self._objective.gradient)

    def _pairwise(
        self, active: ActiveSet, x: Floats, gradient: Floats, worst: int, best: int
    ) -> None:
        direction = active.matrix[best] - active.matrix[worst]
        limit = float(active.weights[worst])
        active.shift(worst, best, self._step(x, gradient, direction, limit))

    def _away(self, active: ActiveSet, x: Floats, gradient: Floats, worst: int) -> None:
        weight = float(active.weights[worst])
        direction = x - active.matrix[worst]
        active.leave(worst, self._step(x, gradient, direction, weight / (1 - weight)))

    def _towards(self, active: ActiveSet, x: Floats, gradient: Floats, index: int) -> None:
        direction = active.matrix[index] - x
        active.approach(index, self._step(x, gradient, direction, 1.0))

    def _step(self, x: Floats, gradient: Floats, direction: Floats, limit: float) -> float:
        self.iterations += 1
        slope = float(gradient @ direction)
        return 0.0 if slope >= 0 else self._objective.step(x, slope, direction, limit)

    def _lift(self, x: Floats) -> float:
        """What strong convexity adds, since feasible points are whole."""
        if self._strong_convexity == 0:
            return 0.0
        fraction = self._oracle.fractional(x)
        lift = self._strong_convexity / 2 * float(fraction @ fraction)
        return lift * (1 - 2 * gamma(len(x) + 4))
