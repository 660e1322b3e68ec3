"""A domain's oracles, with their calls counted and their answers checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import InvalidInput
from ..solution import Evidence
from .domain import Domain, Floats

_WHOLE = 1e-6
"""A value this near to a whole number counts as whole."""


class Oracle:
    """Linear minimisation over a domain under bounds.

    Parameters
    ----------
    domain
        The set.
    hull
        Whether nodes minimise over the convex hull, or over the continuous relaxation.

    Attributes
    ----------
    error
        How far an answer may be from optimal, as a share of the largest cost: rounding and the
        tolerance of another solver.
    evidence
        CLAIMED if there is such a tolerance, else GUARDED.
    """

    def __init__(self, domain: Domain, hull: bool) -> None:
        relaxed: Callable[[Floats, Floats, Floats], Floats | None] | None
        relaxed = None if hull else getattr(domain, "lmo_relaxed", None)
        if not hull and relaxed is None:
            raise InvalidInput(f"{type(domain).__name__} has no lmo_relaxed; use hull=True.")
        self._domain, self._relaxed = domain, relaxed
        tolerance = _share(domain, "lmo_error")
        self.error = tolerance + _share(domain, "lmo_rounding")
        self.evidence = Evidence.CLAIMED if tolerance > 0 else Evidence.GUARDED
        self.calls = self.relaxed_calls = self.heuristic_calls = 0

    @property
    def integer_variables(self) -> int:
        """How many variables must be whole."""
        return int(self._domain.integer.sum())

    @property
    def pure(self) -> bool:
        """Whether all variables must be whole."""
        return bool(self._domain.integer.all())

    def node(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        """The point that a node's Frank-Wolfe asks for."""
        if self._relaxed is None:
            self.calls += 1
            return self._checked(self._domain.lmo(direction, lower, upper), lower, upper, True)
        self.relaxed_calls += 1
        return self._checked(self._relaxed(direction, lower, upper), lower, upper, False)

    def feasible(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        """A feasible point, for a heuristic."""
        self.heuristic_calls += 1
        return self._checked(self._domain.lmo(direction, lower, upper), lower, upper, True)

    def contains(self, x: Floats) -> bool:
        """Whether ``x`` ``[n]`` is a point of the set."""
        domain = self._domain
        if not self.is_whole(x) or (x < domain.lower).any() or (x > domain.upper).any():
            return False
        told = getattr(domain, "contains", None)
        if told is not None:
            return bool(told(x))
        return self.feasible(np.zeros(domain.n), x, x) is not None

    def fractional(self, x: Floats) -> Floats:
        """Distance of ``x`` ``[n]`` to whole numbers, 0 for continuous variables."""
        distance: Floats = np.abs(x - np.rint(x))
        return np.where(self._domain.integer & (distance > _WHOLE), distance, 0.0)

    def is_whole(self, x: Floats) -> bool:
        """Whether ``x`` ``[n]`` is exactly whole where it must be."""
        return bool((x == np.rint(x))[self._domain.integer].all())

    def fixed(self, x: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
        """Bounds with the integer variables fixed at ``x`` rounded, inside the given bounds."""
        whole = np.rint(x).clip(lower, upper)
        integer = self._domain.integer
        return np.where(integer, whole, lower), np.where(integer, whole, upper)

    def _checked(
        self, point: Floats | None, lower: Floats, upper: Floats, whole: bool
    ) -> Floats | None:
        if point is None:
            return None
        point = np.asarray(point, dtype=np.float64)
        if point.shape != lower.shape:
            raise InvalidInput(f"The oracle answered shape {point.shape}, not {lower.shape}.")
        if whole:
            point = np.where(
                self._domain.integer & (self.fractional(point) == 0), np.rint(point), point
            )
        if not (
            (point >= lower - _WHOLE).all()
            and (point <= upper + _WHOLE).all()
            and (not whole or self.is_whole(point))
        ):
            raise InvalidInput(
                f"{type(self._domain).__name__}'s oracle answered a point outside of its bounds "
                "or with fractions; correct its lmo."
            )
        return point


def _share(domain: Domain, name: str) -> float:
    share = float(getattr(domain, name, 0.0))
    if not 0 <= share < np.inf:
        raise InvalidInput(f"The domain's {name} is {share}; it must be a number from 0 upwards.")
    return share
