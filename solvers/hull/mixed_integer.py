"""Linear constraints on integer and continuous variables, through HiGHS."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import floats, sparse_rows
from ..errors import InvalidInput
from ..highs import Program
from .domain import Floats, Lagrangian, checked_bounds, lowered


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
    What else is believed of HiGHS: `solvers.highs.Program`.
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
        rows = sparse_rows(matrix, "The constraints")
        count, self.n = rows.shape
        low, up = _spread("least", least, count), _spread("most", most, count)
        if not np.isfinite(rows.data).all() or np.isnan(low).any() or np.isnan(up).any():
            raise InvalidInput("The constraints have NaN or infinite coefficients or NaN bounds.")
        self.lower, self.upper, self.integer = checked_bounds(
            _spread("lower", lower, self.n), _spread("upper", upper, self.n), integer
        )
        self.matrix, self.least, self.most = rows.copy(), low, up
        self._program = Program(rows, low, up, self.integer)

    def lmo(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        return self._program.minimise(direction, lower, upper)

    def lmo_relaxed(self, direction: Floats, lower: Floats, upper: Floats) -> Floats | None:
        return self._program.minimise(direction, lower, upper, whole=False)

    def lagrangian(self, direction: Floats, lower: Floats, upper: Floats) -> Lagrangian | None:
        multiplier = self._program.multipliers(direction, lower, upper)
        if multiplier is None:
            return None
        # Whatever tolerance the multipliers have, those of the right signs give a valid bound.
        used = multiplier != 0
        sides = np.where(multiplier > 0, self.least, self.most)[used]
        paid = multiplier[used] * sides
        moved = abs(self.matrix).T @ np.abs(multiplier)
        cost = direction - self.matrix.T @ multiplier
        return lowered(float(paid.sum()), cost, np.abs(direction) + moved, lower, upper, paid)


def _spread(name: str, values: npt.ArrayLike, count: int) -> Floats:
    """``[count]`` from one number for all or one each, or `InvalidInput`."""
    found = floats(values, name)
    if found.shape not in ((), (count,)):
        raise InvalidInput(f"{name} has shape {found.shape}; give one number or {count}.")
    return np.array(np.broadcast_to(found, count))
