"""Bounds on variables that no better point can cross.

For every feasible ``y`` in a node, convexity and a `Lagrangian` of the gradient ``g`` at ``x`` give

    f(y)  >=  base + |r_j| |y_j - b_j| + mu/2 (y_j - x_j)^2,    base = f(x) - <g, x> + value,

for each ``j``, with reduced costs ``r``. Values of ``y_j`` that make this exceed the best value
known are cut off. (Reduced costs, not the gradient itself: over a domain with ``sum(x)`` fixed,
adding a constant to every entry of the gradient changes nothing.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .domain import Bools, Domain, Dual, Floats
from .node import Relaxed
from .objective import GUARD


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
        surplus = max(best - self.base, 0.0)
        mu = self.strong_convexity
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            reach = surplus / np.abs(self.cost)
        up = integer & (self.cost > 0)
        down = integer & (self.cost < 0)
        upper[up] = np.minimum(upper, np.floor(self.lower + reach + 1e-9))[up]
        lower[down] = np.maximum(lower, np.ceil(self.upper - reach - 1e-9))[down]
        if mu > 0:
            above = _reach(self.cost, self.x - self.lower, surplus, mu)
            below = _reach(-self.cost, self.upper - self.x, surplus, mu)
            highest = np.floor(self.x + above + 1e-9)
            lowest = np.ceil(self.x - below - 1e-9)
            upper[integer] = np.minimum(upper, highest)[integer]
            lower[integer] = np.maximum(lower, lowest)[integer]
        return lower, upper


def cut(
    domain: Domain, relaxed: Relaxed, lower: Floats, upper: Floats, strong_convexity: float
) -> Cut | None:
    """The `Cut` of a solved node; None if the domain has no multipliers."""
    if not isinstance(domain, Dual):
        return None
    found = domain.lagrangian(relaxed.gradient, lower, upper)
    if found is None:
        return None
    terms = np.abs(relaxed.gradient) @ np.abs(relaxed.x) + np.abs(found.cost) @ np.maximum(
        np.abs(lower), np.abs(upper)
    )
    guard = GUARD * (abs(relaxed.value) + abs(found.value) + float(terms))
    base = relaxed.value - float(relaxed.gradient @ relaxed.x) + found.value - guard
    return Cut(lower, upper, relaxed.x, found.cost, base, strong_convexity)


def _reach(cost: Floats, offset: Floats, surplus: float, mu: float) -> Floats:
    """Largest ``t >= 0`` with ``max(cost, 0) (offset + t) + mu/2 t^2 <= surplus``, 0 if none."""
    slope = np.maximum(cost, 0.0)
    left = surplus - slope * offset
    root = np.sqrt(np.maximum(slope**2 + 2 * mu * left, 0.0))
    return np.maximum((root - slope) / mu, 0.0)
