"""Points of a domain: those with a weight make up the iterate, others wait to be used again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .domain import Bools, Floats

_NEGLIGIBLE = 1e-15
"""Weights below this are rounding errors of a weight that became zero."""

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


def inside(points: Floats, lower: Floats, upper: Floats) -> Bools:
    """Which rows of ``points`` ``[points, n]`` respect the bounds."""
    return np.asarray(((points >= lower - _SLACK) & (points <= upper + _SLACK)).all(axis=1))
