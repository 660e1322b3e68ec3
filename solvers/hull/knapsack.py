"""One knapsack over binaries, where dynamic programming makes the hull as cheap as a relaxation."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..arrays import floats, number
from ..errors import InvalidInput
from ..rounding import gamma
from .domain import Floats, Lagrangian, checked_bounds, lowered


class Knapsack:
    """0/1 vectors with ``weights @ x <= capacity``.

    `lmo` is exact dynamic programming over capacities, ``O(n * capacity)``; `lmo_relaxed` is
    Dantzig's rule, with one fractional entry.

    Parameters
    ----------
    weights
        ``[n]``, whole, non-negative.
    capacity
        Whole; more than the sum of the weights is as much as that. Its product with ``n`` is the
        memory of a call, in bytes.
    """

    def __init__(self, weights: npt.ArrayLike, capacity: int) -> None:
        self.weights = floats(weights, "A knapsack's weights")
        if self.weights.ndim != 1 or not (
            np.isfinite(self.weights).all()
            and (self.weights >= 0).all()
            and (self.weights == np.rint(self.weights)).all()
        ):
            raise InvalidInput("A knapsack's weights must be non-negative whole numbers.")
        if not isinstance(capacity, int) or isinstance(capacity, bool):
            held = number(capacity, "A knapsack's capacity")
            if not (math.isfinite(held) and held == int(held)):
                raise InvalidInput(f"A knapsack's capacity {held} must be a whole number.")
            capacity = int(held)
        self.capacity = min(capacity, sum(map(int, self.weights.tolist())))
        self.n = len(self.weights)
        self.lower, self.upper, self.integer = checked_bounds(
            np.zeros(self.n), np.ones(self.n), None
        )
        # Values of the dynamic program are sums of n costs, compared once per item; Dantzig's
        # rule compares quotients and fills with them, each a few roundings away.
        self.lmo_rounding = 4 * self.n * gamma(self.n + 4)

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        room = self._room(lower, upper)
        if room is None:
            return None
        vertex: Floats = lower.copy()
        items = np.flatnonzero((upper > lower) & (direction < 0) & (self.weights <= room))
        best = np.zeros(room + 1)
        taken = np.zeros((len(items), room + 1), dtype=bool)
        sizes = self.weights[items].astype(int)
        for k, size in enumerate(sizes):
            with_item = best[: room + 1 - size] - direction[items[k]]
            taken[k, size:] = with_item > best[size:]
            best[size:] = np.maximum(best[size:], with_item)
        for k in range(len(items) - 1, -1, -1):
            if taken[k, room]:
                vertex[items[k]] = 1.0
                room -= sizes[k]
        return vertex

    def lmo_relaxed(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        room = self._room(lower, upper)
        return None if room is None else self._dantzig(direction, lower, upper, room)[0]

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        room = self._room(lower, upper)
        if room is None:
            return None
        price = self._dantzig(direction, lower, upper, room)[1]
        cost = direction + price * self.weights
        paid = -price * self.capacity
        size = np.abs(direction) + price * self.weights
        return lowered(paid, cost, size, lower, upper, np.array([paid]))

    def _room(self, lower: Floats, upper: Floats) -> int | None:
        """Capacity that the fixed ones leave; None if they leave no point."""
        room = self.capacity - int(self.weights @ lower)
        return None if room < 0 or (lower > upper).any() else room

    def _dantzig(
        self, direction: Floats, lower: Floats, upper: Floats, room: int
    ) -> tuple[Floats, float]:
        """The relaxed vertex, and the price of capacity."""
        vertex = lower.copy()
        wanted = (upper > lower) & (direction < 0)
        vertex[wanted & (self.weights == 0)] = 1.0
        items = np.flatnonzero(wanted & (self.weights > 0))
        worth = -direction[items] / self.weights[items]
        order = items[np.argsort(-worth, kind="stable")]
        before = np.cumsum(self.weights[order]) - self.weights[order]
        vertex[order] = ((room - before) / self.weights[order]).clip(0, 1)
        cut = np.flatnonzero(vertex[order] < 1)
        price = 0.0 if len(cut) == 0 else -direction[order[cut[0]]] / self.weights[order[cut[0]]]
        return vertex, float(price)
