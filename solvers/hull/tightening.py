"""Bounds on variables that no better point can cross.

For every feasible ``y`` in a node, convexity and a `Lagrangian` of the gradient ``g`` at ``x`` give

    f(y)  >=  base + |r_j| |y_j - b_j| + mu/2 (y_j - x_j)^2,    base = f(x) - <g, x> + value,

for each ``j``, with reduced costs ``r``. Values of ``y_j`` that make this exceed the best value
known are cut off; ``base`` is less all that rounding may have added to it. (Reduced costs, not the
gradient itself: over a domain with ``sum(x)`` fixed, adding a constant to every entry of the
gradient changes nothing.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..rounding import UNIT_ROUNDOFF, gamma
from .domain import TINY, Bools, Domain, Dual, Floats
from .node import Relaxed

_FURTHER = 1 + 1e-12
"""A distance is taken longer by this than computed: it is a few roundings away."""

_WHOLE = 1e-9
"""A distance this near below a whole number counts as that number."""


@dataclass(frozen=True)
class Cut:
    """What a solved node knows about the variables' values, kept for better incumbents.

    Attributes
    ----------
    lower, upper
        The bounds that it was derived for, float64 ``[n]``.
    x, cost, base
        As above.
    strong_convexity
        ``mu``.
    """

    lower: Floats
    upper: Floats
    x: Floats
    cost: Floats
    base: float
    strong_convexity: float

    def apply(self, best: float, integer: Bools) -> tuple[Floats, Floats]:
        """Bounds outside of which nothing is better than ``best``; the same where not integer."""
        lower, upper = self.lower.copy(), self.upper.copy()
        surplus = max(best - self.base, 0.0) + 2 * UNIT_ROUNDOFF * (abs(best) + abs(self.base))
        mu = self.strong_convexity
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            reach = np.floor(surplus / np.abs(self.cost) * _FURTHER + _WHOLE)
        up = integer & (self.cost > 0)
        down = integer & (self.cost < 0)
        upper[up] = np.minimum(upper, self.lower + reach)[up]
        lower[down] = np.maximum(lower, self.upper - reach)[down]
        if mu > 0:
            above = _reach(self.cost, self.x - self.lower, surplus, mu)
            below = _reach(-self.cost, self.upper - self.x, surplus, mu)
            highest = np.floor(self.x + above * _FURTHER + _WHOLE * (1 + np.abs(self.x)))
            lowest = np.ceil(self.x - below * _FURTHER - _WHOLE * (1 + np.abs(self.x)))
            upper[integer] = np.minimum(upper, highest)[integer]
            lower[integer] = np.maximum(lower, lowest)[integer]
        return lower, upper


def cut(
    domain: Domain,
    relaxed: Relaxed,
    lower: Floats,
    upper: Floats,
    strong_convexity: float,
    error: float,
) -> Cut | None:
    """The `Cut` of a solved node; None if the domain has no multipliers.

    ``error``: how far above the function its computed tangent at the point may be.
    """
    if not isinstance(domain, Dual):
        return None
    found = domain.lagrangian(relaxed.gradient, lower, upper)
    if found is None:
        return None
    here = float(relaxed.gradient @ relaxed.x)
    size = float(np.abs(relaxed.gradient) @ np.abs(relaxed.x))
    guard = error + gamma(len(lower) + 8) * (size + abs(relaxed.value) + abs(found.value))
    base = relaxed.value - here + found.value - 1.001 * guard
    return Cut(lower, upper, relaxed.x, found.cost, base, strong_convexity)


def _reach(cost: Floats, offset: Floats, surplus: float, mu: float) -> Floats:
    """Largest ``t >= 0`` with ``max(cost, 0) (offset + t) + mu/2 t^2 <= surplus``, 0 if none."""
    slope = np.maximum(cost, 0.0)
    paid = slope * offset
    left = np.maximum(surplus - paid + 4 * UNIT_ROUNDOFF * (surplus + np.abs(paid)), 0.0)
    # (root - slope) / mu would cancel.
    root = np.sqrt(slope**2 + 2 * mu * left)
    return np.where(left > 0, 2 * left / np.maximum(root + slope, TINY), 0.0)
