"""Linear constraints on integer and continuous variables, through HiGHS."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, issparse, vstack

from ..errors import InvalidInput
from .domain import Floats, Lagrangian, checked_bounds

_ROW_EXPONENT = 10
"""HiGHS sees coefficients up to 2**10: its absolute tolerance of 1e-6 is then 1e-9 of them."""

_COST_EXPONENT = 16
"""HiGHS sees costs up to 2**16, so that its absolute gap of 1e-6 is some 2e-11 of them."""


class MixedInteger:
    """``least <= matrix @ x <= most``, ``lower <= x <= upper``, some variables whole.

    `lmo` minimises over the convex hull of the feasible points (a mixed-integer program),
    `lmo_relaxed` over the continuous relaxation (a linear program).

    Parameters
    ----------
    matrix
        ``[constraints, n]``, dense or scipy.sparse.
    least, most
        ``[constraints]`` or one number for all; infinite where there is no bound.
    lower, upper
        ``[n]`` or one number for all; 0 and 1 unless given.
    integer
        Bool ``[n]``; None for all whole.

    Attributes
    ----------
    matrix, least, most
        As given, ``matrix`` as csr_array and the bounds ``[constraints]``.

    Notes
    -----
    A constraint may be exceeded by some 1e-9 of its largest coefficient, as far as HiGHS does.
    """

    lmo_error = 1e-9
    """How far from optimal an answer may be, as a share of the largest cost."""

    def __init__(
        self,
        matrix: Any,
        least: npt.ArrayLike,
        most: npt.ArrayLike,
        *,
        lower: npt.ArrayLike = 0.0,
        upper: npt.ArrayLike = 1.0,
        integer: npt.ArrayLike | None = None,
    ) -> None:
        rows = csr_array(matrix if issparse(matrix) else np.asarray(matrix, dtype=np.float64))
        count, self.n = rows.shape
        low, up = (np.broadcast_to(np.asarray(b, dtype=np.float64), count) for b in (least, most))
        if not np.isfinite(rows.data).all() or np.isnan(low).any() or np.isnan(up).any():
            raise InvalidInput("The constraints have NaN or infinite coefficients or NaN bounds.")
        self.lower, self.upper, self.integer = checked_bounds(
            np.broadcast_to(np.asarray(lower, dtype=np.float64), self.n),
            np.broadcast_to(np.asarray(upper, dtype=np.float64), self.n),
            integer,
        )
        self.matrix, self.least, self.most = rows.copy(), low, up
        largest = np.asarray(abs(rows).max(axis=1).todense(), dtype=np.float64).ravel()
        scale = np.ldexp(1.0, _ROW_EXPONENT - np.frexp(largest)[1])
        rows.data = rows.data * np.repeat(scale, np.diff(rows.indptr))
        self._constraint = LinearConstraint(rows, low * scale, up * scale)
        below, above = np.isfinite(low), np.isfinite(up)
        self._inequality = csr_array(vstack([rows[above], -rows[below]]))
        self._rhs = np.concatenate([(up * scale)[above], -(low * scale)[below]])

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        return self._minimise(direction, lower, upper, self.integer.astype(int))

    def lmo_relaxed(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        return self._minimise(direction, lower, upper, np.zeros(self.n, dtype=int))

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        scaled, factor = _scaled(direction)
        result = linprog(
            scaled,
            A_ub=self._inequality,
            b_ub=self._rhs,
            bounds=np.stack([lower, upper], axis=1),
            method="highs",
        )
        if result.status != 0:
            return None
        # Whatever tolerance the multipliers have, non-negative ones give a valid bound.
        multiplier = np.maximum(-result.ineqlin.marginals, 0.0)
        cost = (scaled + self._inequality.T @ multiplier) / factor
        value = cost @ np.where(cost > 0, lower, upper) - multiplier @ self._rhs / factor
        return Lagrangian(float(value), cost)

    def _minimise(
        self, direction: Floats, lower: Floats, upper: Floats, integrality: npt.NDArray[Any]
    ) -> Floats | None:
        if (lower > upper).any():
            return None
        for presolve in (True, False):  # presolve may fail to tell infeasible from unbounded
            result = milp(
                _scaled(direction)[0],
                integrality=integrality,
                bounds=Bounds(lower, upper),
                constraints=self._constraint,
                options={"mip_rel_gap": 0.0, "presolve": presolve},
            )
            if result.status == 0:
                point = np.asarray(result.x, dtype=np.float64)
                point = np.where(integrality == 1, np.rint(point), point)
                return point.clip(lower, upper)
            if result.status == 2:
                return None
        raise RuntimeError(f"HiGHS found no answer: {result.message}")


def _scaled(direction: Floats) -> tuple[Floats, float]:
    """The direction times a power of two that suits absolute tolerances, and that power."""
    factor = float(np.ldexp(1.0, _COST_EXPONENT - int(np.frexp(np.abs(direction).max())[1])))
    return direction * factor, factor
