"""Bounded sets with integer variables, known through a linear minimisation oracle under bounds.

Every domain here except `MixedInteger` (in its own module) is an integral polytope: the convex
hull of its integer points is its continuous relaxation, and stays so under integer bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..arrays import floats, number
from ..errors import InvalidInput
from ..options import whole_number
from ..rounding import gamma

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

TINY = float(np.finfo(np.float64).tiny)
"""Far more than what underflow takes off a product."""


@runtime_checkable
class Domain(Protocol):
    """What `minimize` asks of a set.

    Attributes
    ----------
    n
        Number of variables.
    lower, upper
        Float64 ``[n]``, finite: a box that holds the set.
    integer
        Bool ``[n]``: which variables must be whole.

    Notes
    -----
    A domain may also have ``lmo_relaxed``, the oracle of its continuous relaxation with the same
    arguments (asked for with ``hull=False``), ``lagrangian`` (see `Lagrangian`), without which no
    bound is tightened, and two numbers, how far from optimal an answer may be as a share of the
    largest cost, by which node bounds are lowered: ``lmo_rounding``, which is derived, and
    ``lmo_error``, the tolerance of another solver, whose word the bounds then are. Without them
    answers are taken to be exact. ``contains(x)``, if there, tells whether a start is in the set.
    """

    n: int
    lower: Floats
    upper: Floats
    integer: Bools

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        """Linear minimisation oracle under bounds.

        Parameters
        ----------
        direction, lower, upper
            Float64 ``[n]``; bounds of integer variables are whole.

        Returns
        -------
        Floats | None
            A point of the set with ``lower <= v <= upper``, whole where it must be, that
            minimises ``<direction, v>``; None if there is no such point.
        """


@dataclass(frozen=True)
class Lagrangian:
    """A bound on a linear function over a domain, from multipliers of its coupling constraints.

    For every point ``y`` of the set within the bounds that it was made for,

        <direction, y>  >=  value + sum_j |cost_j| * |y_j - b_j|,

    where ``b_j`` is the lower bound of ``y_j`` where ``cost_j > 0`` and the upper one elsewhere,
    in exact arithmetic: rounding errors are taken off ``value`` by whoever computes it (`lowered`).

    Attributes
    ----------
    value
        A lower bound on ``<direction, y>``.
    cost
        Reduced costs, float64 ``[n]``.
    """

    value: float
    cost: Floats


@runtime_checkable
class Dual(Protocol):
    """A domain that can say what moving a variable off its bound costs at least."""

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        """`Lagrangian` of ``direction`` under bounds; None if the bounds leave no point."""


class Box:
    """``lower <= x <= upper``.

    Parameters
    ----------
    lower, upper
        ``[n]``.
    integer
        Bool ``[n]``; None for all whole.

    Examples
    --------
    >>> Box([0, 0], [3, 1]).lmo(np.array([1.0, -1.0]), np.zeros(2), np.array([3.0, 1.0]))
    array([0., 1.])
    """

    def __init__(
        self, lower: npt.ArrayLike, upper: npt.ArrayLike, integer: npt.ArrayLike | None = None
    ) -> None:
        self.lower, self.upper, self.integer = checked_bounds(lower, upper, integer)
        self.n = len(self.lower)

    @classmethod
    def cube(cls, n: int) -> Box:
        """All 0/1 vectors of length ``n``."""
        n = _variables(n)
        return cls(np.zeros(n), np.ones(n))

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        return None if (lower > upper).any() else np.where(direction < 0, upper, lower)

    lmo_relaxed = lmo

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        if (lower > upper).any():
            return None
        return lowered(0.0, direction, np.zeros(self.n), lower, upper)


class SumRange:
    """``least <= sum(x) <= most``, ``lower <= x <= upper``: a box cut by one sum.

    The oracle starts at the lower bounds and raises the variables in ascending order of their
    cost, those of negative cost as far as ``most`` allows, others only until ``least`` is met.

    Parameters
    ----------
    least, most
        Whole or infinite, so that the polytope is integral.
    lower, upper
        ``[n]``; whole.
    integer
        Bool ``[n]``; None for all whole.
    """

    def __init__(
        self,
        least: float,
        most: float,
        lower: npt.ArrayLike,
        upper: npt.ArrayLike,
        integer: npt.ArrayLike | None = None,
    ) -> None:
        self.lower, self.upper, self.integer = checked_bounds(lower, upper, integer)
        self.n = len(self.lower)
        self.least, self.most = number(least, "least"), number(most, "most")
        if math.isnan(self.least) or math.isnan(self.most):
            raise InvalidInput("A bound of the sum is NaN; give a number, or infinity for none.")
        ends = np.array([self.least, self.most, *self.lower, *self.upper], dtype=np.float64)
        ends = ends[np.isfinite(ends)]
        if not (ends == np.rint(ends)).all():
            raise InvalidInput("Sums and bounds must be whole numbers; use MixedInteger otherwise.")

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        filled = self._fill(direction, lower, upper)
        return None if filled is None else filled[0]

    lmo_relaxed = lmo

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        filled = self._fill(direction, lower, upper)
        if filled is None:
            return None
        _, price = filled
        cost = direction - price
        # A positive price is paid for reaching `least`, a negative one for staying below `most`.
        paid = 0.0 if price == 0 else price * (self.least if price > 0 else self.most)
        if not math.isfinite(paid):
            cost, paid = direction, 0.0
        size = np.abs(direction) + abs(price)
        return lowered(paid, cost, size, lower, upper, np.array([paid]))

    def _fill(self, direction: Floats, lower: Floats, upper: Floats) -> tuple[Floats, float] | None:
        """The vertex, and the multiplier of the sum."""
        room = upper - lower
        if (room < 0).any():
            return None
        base = lower.sum()
        least, most = self.least - base, self.most - base
        if most < 0 or room.sum() < least or least > most:
            return None
        wanted = room[direction < 0].sum()
        amount = min(max(wanted, least), most)
        order = np.argsort(direction, kind="stable")
        after = np.cumsum(room[order])
        taken = (amount - (after - room[order])).clip(0, room[order])
        vertex = lower.copy()
        vertex[order] += taken
        if amount == wanted:
            return vertex, 0.0
        last = int(np.searchsorted(after, amount))
        marginal = direction[order[min(last, self.n - 1)]]
        if last + 1 < self.n and after[last] == amount:  # any price up to the next one will do
            marginal = (marginal + direction[order[last + 1]]) / 2
        return vertex, float(min(marginal, 0.0) if amount < wanted else max(marginal, 0.0))


class Simplex(SumRange):
    """``x >= 0``, ``sum(x) = total``, whole.

    Parameters
    ----------
    n
        Variables.
    total
        Their sum.
    """

    def __init__(self, n: int, total: int) -> None:
        n, sum_ = _variables(n), number(total, "total")
        super().__init__(sum_, sum_, np.zeros(n), np.full(n, sum_))


class UnitSimplex(SumRange):
    """``x >= 0``, ``sum(x) <= total``, whole."""

    def __init__(self, n: int, total: int) -> None:
        n, most = _variables(n), number(total, "total")
        super().__init__(-math.inf, most, np.zeros(n), np.full(n, most))


class ReverseKnapsack(SumRange):
    """``0 <= x <= upper``, ``sum(x) >= total``, whole; ``upper`` is ``total`` unless given."""

    def __init__(self, n: int, total: int, upper: int | None = None) -> None:
        n, least = _variables(n), number(total, "total")
        most = least if upper is None else number(upper, "upper")
        super().__init__(least, math.inf, np.zeros(n), np.full(n, most))


class Hypersimplex(SumRange):
    """0/1 vectors with exactly ``ones`` ones (``at_most``: or fewer)."""

    def __init__(self, n: int, ones: int, *, at_most: bool = False) -> None:
        n, sum_ = _variables(n), number(ones, "ones")
        super().__init__(-math.inf if at_most else sum_, sum_, np.zeros(n), np.ones(n))


class Birkhoff:
    """Permutation matrices of order ``order``, row after row: ``n = order ** 2``."""

    def __init__(self, order: int) -> None:
        import scipy.optimize  # noqa: F401 (slow to import: not by those who do without, or later)

        self.order = order = whole_number(order, "order", least=1)
        self.lower, self.upper, self.integer = checked_bounds(
            np.zeros(order**2), np.ones(order**2), None
        )
        self.n = order**2
        # The assignment is computed in whole numbers below this, whose sums along alternating
        # paths (8 * order of them at most) are exact; each cost is off by half a unit.
        self._units = 2.0 ** (52 - math.ceil(math.log2(8 * order)))
        self.lmo_rounding = order / self._units

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        assigned = self._assign(direction, lower, upper)
        if assigned is None:
            return None
        vertex = np.zeros((self.order, self.order))
        vertex[np.arange(self.order), assigned[1]] = 1
        return vertex.ravel()

    lmo_relaxed = lmo

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        assigned = self._assign(direction, lower, upper)
        if assigned is None:
            return None
        cost, columns = assigned
        matched = cost[np.arange(self.order), columns]
        # Potentials of the columns: shortest paths in the residual graph (Bellman-Ford).
        potential = np.zeros(self.order)
        for _ in range(self.order):
            through = (potential[columns] - matched)[:, None] + cost
            potential = np.minimum(potential, through.min(axis=0))
        rows = matched - potential[columns]
        # Entries that fixed ones rule out are zero in every point, whatever their cost.
        reduced = np.where(np.isfinite(cost), cost - (rows[:, None] + potential), 0.0).ravel()
        paid = np.concatenate([rows, potential])
        size = np.where(np.isfinite(cost), np.abs(cost), 0.0)
        size = (size + np.abs(rows)[:, None] + np.abs(potential)).ravel()
        return lowered(float(paid.sum()), reduced, size, lower, upper, paid)

    def _assign(
        self, direction: Floats, lower: Floats, upper: Floats
    ) -> tuple[Floats, npt.NDArray[np.intp]] | None:
        """Costs with the fixed entries spelled out, and the best column of each row."""
        from scipy.optimize import linear_sum_assignment

        shape = (self.order, self.order)
        fixed = (lower.reshape(shape) > 0.5).astype(int)
        others = np.maximum(fixed.sum(axis=1)[:, None], fixed.sum(axis=0)) - fixed
        allowed = (upper.reshape(shape) > 0.5) & (others == 0)
        cost = np.where(allowed, direction.reshape(shape), np.inf)
        try:
            largest = np.abs(direction).max()
            rounded = np.rint(cost / largest * self._units) if largest > 0 else cost
            return cost, linear_sum_assignment(rounded)[1]
        except ValueError:  # raised for an infeasible matrix
            return None


def _variables(n: int) -> int:
    return whole_number(n, "n", least=1)


def checked_bounds(
    lower: npt.ArrayLike, upper: npt.ArrayLike, integer: npt.ArrayLike | None
) -> tuple[Floats, Floats, Bools]:
    """Float64 bounds rounded inwards to whole numbers where they must be, or `InvalidInput`."""
    low, up = floats(lower, "lower"), floats(upper, "upper")
    if low.ndim != 1 or low.shape != up.shape or len(low) == 0:
        raise InvalidInput(
            f"Bounds have shapes {low.shape} and {up.shape}; give two vectors of one length."
        )
    flags = np.ones(len(low)) if integer is None else floats(integer, "integer")
    if flags.shape != low.shape:
        raise InvalidInput(f"integer has shape {flags.shape}; it must be {low.shape}.")
    whole = flags == 1
    if not (whole | (flags == 0)).all():
        raise InvalidInput("integer must say True or False of every variable.")
    if not (np.isfinite(low).all() and np.isfinite(up).all()):
        raise InvalidInput("Bounds must be finite; the search needs a bounded domain.")
    low[whole], up[whole] = np.ceil(low[whole] - 1e-9) + 0.0, np.floor(up[whole] + 1e-9)
    if (low > up).any():
        j = int((low > up).argmax())
        raise InvalidInput(f"Variable {j} has no value between its bounds; loosen one.")
    return low, up, whole


def lowered(
    paid: float,
    cost: Floats,
    size: Floats,
    lower: Floats,
    upper: Floats,
    parts: Floats | None = None,
) -> Lagrangian:
    """The `Lagrangian` of computed reduced costs, its value less what rounding may have changed.

    Parameters
    ----------
    paid
        What the multipliers are worth, the computed sum of ``parts``.
    cost
        Computed reduced costs, ``[n]``.
    size
        Sum of the sizes of the terms that each of them is the sum of.
    lower, upper
        ``[n]``.
    parts
        Addends of ``paid``; None for none.

    Notes
    -----
    Exact reduced costs differ from the computed ones by ``gamma_k size_j``, their sum over the
    box and ``paid`` from the exact sums by ``gamma_k`` of the terms, for k roundings in a row.
    """
    parts = np.zeros(0) if parts is None else parts
    terms = float((np.abs(cost) + size) @ np.maximum(np.abs(lower), np.abs(upper)))
    terms += float(np.abs(parts).sum()) + abs(paid)
    count = len(cost) + len(parts) + 8
    value = paid + _box_minimum(cost, lower, upper)
    return Lagrangian(value - 2 * gamma(count) * terms - count * TINY, cost)


def _box_minimum(cost: Floats, lower: Floats, upper: Floats) -> float:
    return float(cost @ np.where(cost > 0, lower, upper))
