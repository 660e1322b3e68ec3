"""Points of a domain: those with a weight make up the iterate, others wait to be used again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .domain import Bools, Floats

_NEGLIGIBLE = 1e-15
"""Weights below this are rounding errors of a weight that became zero."""

_LARGEST = 1e6
"""Weights beyond this come from points that are nearly dependent."""

_SLACK = 1e-9
"""How far a point may lie outside of bounds and still count as inside."""


class ActiveSet:
    """Weighted points, ``x = weights @ points``.

    Points of weight zero are the store of discarded vertices: they are searched before an oracle
    is called.

    Parameters
    ----------
    points
        Float64 ``[n]`` each; shared, never changed.
    weights
        Float64 ``[points]``, non-negative, not all zero; rescaled to sum to one.
    """

    def __init__(self, points: Sequence[Floats], weights: Floats) -> None:
        self.points = list(points)
        self._size = len(self.points)
        self._matrix = np.empty((2 * self._size + 8, len(self.points[0])))
        self._matrix[: self._size] = self.points
        self._weights = np.zeros(len(self._matrix))
        self._weights[: self._size] = weights / weights.sum()
        self._gradients: dict[int, Floats] = {}
        self._update()

    @property
    def weights(self) -> Floats:
        """Float64 ``[points]``."""
        return self._weights[: self._size]

    @property
    def matrix(self) -> Floats:
        """All points, ``[points, n]``."""
        return self._matrix[: self._size]

    def scores(self, gradient: Floats) -> Floats:
        """``<gradient, point>`` of every point."""
        return self.matrix @ gradient

    def worst(self, scores: Floats) -> int:
        """The weighted point of the highest score."""
        return int(np.where(self.weights > 0, scores, -np.inf).argmax())

    def best(self, scores: Floats) -> int:
        """The weighted point of the lowest score."""
        return int(np.where(self.weights > 0, scores, np.inf).argmin())

    def add(self, point: Floats) -> int:
        """Append a point with weight zero and return its index."""
        if self._size == len(self._matrix):
            self._matrix = np.concatenate([self._matrix, np.empty_like(self._matrix)])
            self._weights = np.concatenate([self._weights, np.zeros(len(self._weights))])
        self._matrix[self._size] = point
        self._weights[self._size] = 0.0
        self.points.append(point)
        self._size += 1
        return self._size - 1

    def shift(self, source: int, target: int, amount: float) -> None:
        """Move weight from one point to another: a pairwise step."""
        self._weights[source] -= amount
        self._weights[target] += amount
        self._update()

    def approach(self, target: int, amount: float) -> None:
        """Move ``x`` towards a point by a share of the way: a Frank-Wolfe step."""
        self._weights[: self._size] *= 1 - amount
        self._weights[target] += amount
        self._update()

    def leave(self, source: int, amount: float) -> None:
        """Move ``x`` away from a point: an away step."""
        self._weights[: self._size] *= 1 + amount
        self._weights[source] -= amount
        self._update()

    def correct(self, gradient: Floats, gradient_at: Callable[[Floats], Floats]) -> bool:
        """Minimise a quadratic over the convex hull of the weighted points.

        Minor cycles as in Wolfe's method for the nearest point of a polytope: go to the minimum
        over the affine hull, and drop a point whenever its weight reaches zero on the way.

        Parameters
        ----------
        gradient
            At ``x``, float64 ``[n]``.
        gradient_at
            Gradient anywhere, affine since the function is quadratic; asked once per point.

        Returns
        -------
        bool
            False, and nothing has changed, if the linear systems are singular.
        """
        index = np.flatnonzero(self.weights)
        for i in index.tolist():
            if i not in self._gradients:
                self._gradients[i] = gradient_at(self.points[i])
        apart = self.matrix[index] - self.x
        hessian = apart @ (np.array([self._gradients[i] for i in index.tolist()]) - gradient).T
        slope = apart @ gradient
        weights = self.weights[index]
        while True:
            target = _affine_minimum(hessian, slope)
            if target is None:
                return False
            negative = target <= 0
            if not negative.any():
                break
            moved = weights - target
            # Weights that an earlier cycle brought to zero too have nowhere to go.
            reach = np.where(negative, weights / np.where(moved > 0, moved, 1.0), np.inf)
            weights = weights - reach.min() * moved
            keep = np.arange(len(index)) != reach.argmin()
            index, weights, slope = index[keep], weights[keep], slope[keep]
            hessian = hessian[np.ix_(keep, keep)]
        self.weights[:] = 0.0
        self.weights[index] = target
        self._update()
        return True

    def _update(self) -> None:
        weights = self._weights[: self._size]
        weights[weights < _NEGLIGIBLE] = 0.0
        weights /= weights.sum()
        self.x: Floats = weights @ self.matrix

    def kept(self, store: int) -> tuple[list[Floats], Floats]:
        """Weighted points and the newest of the others, at most ``store``; and all weights."""
        waiting = np.flatnonzero(self.weights == 0)[-store:] if store else np.empty(0, dtype=int)
        index = np.concatenate([np.flatnonzero(self.weights), waiting])
        return [self.points[i] for i in index], self.weights[index]


def _affine_minimum(hessian: Floats, slope: Floats) -> Floats | None:
    """Weights summing to one that minimise ``w^T H w / 2 + slope^T w``; None if singular."""
    count = len(slope)
    size = np.abs(hessian).max()
    if count == 1:
        return np.ones(1)
    if size == 0:
        return None
    system = np.full((count + 1, count + 1), size)
    system[:count, :count] = hessian
    system[count, count] = 0.0
    right = np.append(-slope, size)
    try:
        found = np.linalg.solve(system, right)
    except np.linalg.LinAlgError:
        return None
    error = np.abs(system @ found - right).max()
    if not error <= 1e-9 * np.abs(right).max() or np.abs(found[:count]).max() > _LARGEST:
        return None
    return np.asarray(found[:count])


def inside(points: Floats, lower: Floats, upper: Floats) -> Bools:
    """Which rows of ``points`` ``[points, n]`` respect the bounds."""
    return np.asarray(((points >= lower - _SLACK) & (points <= upper + _SLACK)).all(axis=1))
