"""Arbitrary linear constraints on the masks of one layer, with a mixed-integer oracle.

Other than for counts per cell, the polytope ``lower <= A m <= upper, 0 <= m <= 1`` has
fractional vertices, so that the convex hull of the masks is smaller than the continuous
relaxation. `Linear.lmo` minimises over the hull (one mixed-integer program per call),
`Linear.lmo_relaxed` over the relaxation (one linear program).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array, issparse, vstack
from torch import Tensor

from .errors import InvalidInput
from .pattern import Constraints, Pattern, Shape, _shape

Floats: TypeAlias = npt.NDArray[np.float64]

Bound: TypeAlias = float | Sequence[float] | Floats

_TOLERANCE = 1e-9
"""Allowed excess, relative to the bound or the constraint's largest coefficient."""

_ROW_EXPONENT = 10
"""An oracle sees coefficients up to 2**10: its absolute tolerance, 1e-6, is then `_TOLERANCE`."""

_COST_EXPONENT = 16
"""An oracle sees costs up to 2**16, so that HiGHS's absolute gap of 1e-6 is some 2e-11 of them."""


class Linear(Pattern):
    """Masks with ``lower <= matrix @ mask.flatten() <= upper``.

    Unlike other patterns it belongs to one size of layer. Made only if some mask exists.

    Parameters
    ----------
    matrix
        ``[constraints, rows * d]``, dense (NumPy, torch, nested lists) or scipy.sparse; the
        mask's rows follow one another.
    lower, upper
        ``[constraints]`` or one number for all; infinite where there is no bound.
    names
        What to call each constraint in messages; by default "constraint 0" and so on.
    oracle
        "highs" (`scipy.optimize.milp`) or "scip" (PySCIPOpt) for `lmo`. `lmo_relaxed` is
        always HiGHS.

    Raises
    ------
    InvalidInput
        If shapes do not fit, a number is not finite, the oracle is unknown or its library
        missing, or no mask satisfies the constraints.

    Notes
    -----
    A bound gives way by 1e-9 of itself or of the constraint's largest coefficient, whichever
    is larger, so that rounding errors exclude no mask; but a constraint whose coefficients are
    whole numbers, such as counts of parameters, holds exactly. Masks whose costs differ by less
    than 1e-10 of the largest cost are ties to the oracle.
    """

    def __init__(
        self,
        matrix: Any,
        lower: Bound,
        upper: Bound,
        *,
        names: Sequence[str] | None = None,
        oracle: Literal["highs", "scip"] = "highs",
    ) -> None:
        if oracle not in _ORACLES:
            raise InvalidInput(f"oracle '{oracle}' is neither highs nor scip.")
        if oracle == "scip" and importlib.util.find_spec("pyscipopt") is None:
            raise InvalidInput("The oracle 'scip' needs pyscipopt: pip install pyscipopt.")
        self._oracle = oracle
        self._spelled = _checked(matrix, lower, upper)
        count = len(self._spelled.lower)
        self._names = tuple(names or (f"constraint {i}" for i in range(count)))
        if len(self._names) != count:
            raise InvalidInput(f"There are {len(self._names)} names for {count} constraints.")
        self._widened = _widened(self._spelled)
        self._program = _scaled(self._widened)
        if self._minimise(self._program) is None:
            raise InvalidInput(
                f"No mask satisfies the constraints ({', '.join(self._names[:5])}"
                f"{', ...' if count > 5 else ''}); loosen a bound."
            )

    def check(self, shape: Shape) -> None:
        size = self._spelled.matrix.shape[1]
        if shape[0] * shape[1] != size:
            raise InvalidInput(
                f"The constraints are on {size} weights, but the layer has "
                f"{shape[0]} x {shape[1]}; give one coefficient per weight."
            )

    @property
    def coupled(self) -> bool:
        """Always True: a constraint may touch several rows."""
        return True

    def constraints(self, shape: Shape) -> Constraints:
        self.check(shape)
        return self._spelled

    def neighbourhood(self, shape: Shape) -> None:
        return None

    def violation(self, mask: Tensor) -> str | None:
        self.check(_shape(mask))
        sums = self._spelled.matrix @ mask.flatten().cpu().numpy().astype(np.float64)
        low, high = sums < self._widened.lower, sums > self._widened.upper
        if not (low | high).any():
            return None
        first = int((low | high).argmax())
        bound, relation = (
            (self._spelled.lower[first], "at least")
            if low[first]
            else (self._spelled.upper[first], "at most")
        )
        return (
            f"{self._names[first]} sums to {sums[first]:.12g} where "
            f"{relation} {bound:.12g} is allowed"
        )

    def lmo(
        self, direction: Tensor, lower: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        mask = self._minimise(self._objective(direction, lower, upper))
        if mask is None:
            raise _no_mask(self)
        return torch.from_numpy(mask).view(direction.shape).to(direction.device)

    def lmo_relaxed(
        self, direction: Tensor, lower: Tensor | None = None, upper: Tensor | None = None
    ) -> Tensor:
        """Linear minimisation oracle of the continuous relaxation.

        Parameters
        ----------
        direction, lower, upper
            As for `lmo`.

        Returns
        -------
        Tensor
            Float64 ``[rows, d]`` in [0, 1]: a vertex that minimises ``<direction, mask>`` over
            the constraints without integrality.

        Raises
        ------
        InvalidInput
            If the bounds leave nothing, not even a fractional mask.
        """
        values = _highs(self._objective(direction, lower, upper), integral=False)
        if values is None:
            raise _no_mask(self)
        return torch.from_numpy(values.clip(0, 1)).view(direction.shape).to(direction.device)

    def round(self, relaxed: Tensor) -> Tensor:
        """Nearest allowed mask: ``|m - z|^2 = <m, 1 - 2z> + |z|^2`` for a binary ``m``."""
        return self.lmo(1 - 2 * relaxed.double())

    def to_dict(self) -> dict[str, Any]:
        rows = range(len(self._names))
        matrix = self._spelled.matrix
        parts = [slice(*matrix.indptr[i : i + 2]) for i in rows]
        return {
            "kind": "linear",
            "weights": matrix.shape[1],
            "oracle": self._oracle,
            "constraints": [
                {
                    "name": self._names[i],
                    "index": matrix.indices[parts[i]].tolist(),
                    "coefficient": matrix.data[parts[i]].tolist(),
                    "lower": _json_bound(self._spelled.lower[i]),
                    "upper": _json_bound(self._spelled.upper[i]),
                }
                for i in rows
            ],
        }

    def __str__(self) -> str:
        count, size = self._spelled.matrix.shape
        return f"{count} linear constraint{'s' * (count != 1)} on {size} weights"

    def _objective(self, direction: Tensor, lower: Tensor | None, upper: Tensor | None) -> _Program:
        """The program for one direction under one pair of bounds."""
        self.check(_shape(direction))
        if lower is not None and upper is not None and bool((lower & ~upper).any()):
            raise InvalidInput("A weight is fixed both as kept and as pruned; drop one of the two.")
        cost = direction.detach().flatten().cpu().double().numpy()
        if not np.isfinite(cost).all():
            raise InvalidInput("The direction has NaN or infinite values.")
        exponent = _COST_EXPONENT - np.frexp(np.abs(cost).max())[1]
        program = replace(self._program, cost=np.ldexp(cost, exponent))
        if lower is not None:
            program = replace(program, lower=lower.flatten().cpu().double().numpy())
        if upper is not None:
            program = replace(program, upper=upper.flatten().cpu().double().numpy())
        return program

    def _minimise(self, program: _Program) -> npt.NDArray[np.bool_] | None:
        """The best mask that `violation` accepts; None if there is none."""
        while True:
            values = _ORACLES[self._oracle](program)
            if values is None:
                return None
            mask = values > 0.5
            sums = self._spelled.matrix @ mask.astype(np.float64)
            if ((self._widened.lower <= sums) & (sums <= self._widened.upper)).all():
                return mask
            # Within the oracle's tolerances, not within ours.
            program = program.without(mask)


@dataclass(frozen=True)
class _Program:
    """``min cost @ x``, x binary in ``[lower, upper]``, subject to ``constraints``."""

    cost: Floats
    lower: Floats
    upper: Floats
    constraints: Constraints

    def without(self, mask: npt.NDArray[np.bool_]) -> _Program:
        """The same program where ``mask`` alone is no longer allowed."""
        sign = csr_array(np.where(mask, 1.0, -1.0)[None])
        old = self.constraints
        return replace(
            self,
            constraints=Constraints(
                csr_array(vstack([old.matrix, sign])),
                np.append(old.lower, -np.inf),
                np.append(old.upper, mask.sum() - 1.0),
            ),
        )


def _highs(program: _Program, integral: bool = True) -> Floats | None:
    """Optimal values; None if there are none."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    spelled = program.constraints
    for presolve in (True, False):  # presolve may fail to tell infeasible from unbounded
        result = milp(
            program.cost,
            integrality=int(integral),
            bounds=Bounds(program.lower, program.upper),
            constraints=LinearConstraint(spelled.matrix, spelled.lower, spelled.upper),
            options={"mip_rel_gap": 0.0, "presolve": presolve},
        )
        if result.status == 0:
            return np.asarray(result.x, dtype=np.float64)
        if result.status == 2:
            return None
    raise RuntimeError(f"HiGHS found no answer: {result.message}")


def _scip(program: _Program) -> Floats | None:
    """Optimal values; None if there are none."""
    from pyscipopt import Model, quicksum

    model = Model()
    model.hideOutput()
    model.setParam("numerics/feastol", 1e-9)
    x = [
        model.addVar(vtype="B", lb=low, ub=up, obj=cost)
        for cost, low, up in zip(program.cost, program.lower, program.upper, strict=True)
    ]
    spelled = program.constraints
    matrix = spelled.matrix
    for i, (low, up) in enumerate(zip(spelled.lower, spelled.upper, strict=True)):
        part = slice(*matrix.indptr[i : i + 2])
        if part.start == part.stop:
            if low > 0 or up < 0:
                return None
            continue
        pairs = zip(matrix.indices[part], matrix.data[part], strict=True)
        total = quicksum(a * x[j] for j, a in pairs)
        if np.isfinite(low):
            model.addCons(total >= low)
        if np.isfinite(up):
            model.addCons(total <= up)
    model.optimize()
    if model.getStatus() == "infeasible":
        return None
    if model.getStatus() != "optimal":
        raise RuntimeError(f"SCIP found no answer: {model.getStatus()}")
    return np.array([model.getVal(value) for value in x])


_ORACLES: dict[str, Callable[[_Program], Floats | None]] = {"highs": _highs, "scip": _scip}


def _checked(matrix: Any, lower: Bound, upper: Bound) -> Constraints:
    """Read-only float64 copies, or `InvalidInput`."""
    if isinstance(matrix, Tensor):
        matrix = matrix.detach().cpu().numpy()
    if not issparse(matrix):
        matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise InvalidInput(
            f"The constraints have shape {tuple(matrix.shape)}; give a non-empty matrix "
            "[constraints, weights]."
        )
    matrix = csr_array(matrix, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    count = matrix.shape[0]
    lower, upper = (_one_per_row(bound, count) for bound in (lower, upper))
    if not np.isfinite(matrix.data).all() or np.isnan(lower).any() or np.isnan(upper).any():
        raise InvalidInput("The constraints have NaN or infinite coefficients or NaN bounds.")
    wrong = ~(lower <= upper) | (lower == np.inf) | (upper == -np.inf)
    if wrong.any():
        i = int(wrong.argmax())
        raise InvalidInput(
            f"No mask satisfies the constraints: constraint {i} has lower bound "
            f"{lower[i]:.12g} and upper bound {upper[i]:.12g}."
        )
    for values in (matrix.data, matrix.indices, matrix.indptr, lower, upper):
        values.setflags(write=False)
    return Constraints(matrix, lower, upper)


def _one_per_row(bound: Bound, count: int) -> Floats:
    values = np.array(bound, dtype=np.float64)
    if values.shape not in ((), (count,)):
        raise InvalidInput(f"A bound has shape {values.shape}; there are {count} constraints.")
    return np.full(count, values)


def _widened(spelled: Constraints) -> Constraints:
    """Bounds that rounding errors do not cross; whole numbers for sums of whole numbers."""
    matrix, lower, upper = spelled.matrix, spelled.lower, spelled.upper
    fractional = csr_array((matrix.data % 1, matrix.indices, matrix.indptr), shape=matrix.shape)
    whole = _largest(fractional) == 0
    slack_lower, slack_upper = (
        _TOLERANCE * np.maximum(_largest(matrix), np.where(np.isfinite(bound), abs(bound), 0.0))
        for bound in (lower, upper)
    )
    return Constraints(
        matrix,
        np.where(whole, np.ceil(lower - slack_lower.clip(max=0.5)), lower - slack_lower),
        np.where(whole, np.floor(upper + slack_upper.clip(max=0.5)), upper + slack_upper),
    )


def _scaled(spelled: Constraints) -> _Program:
    """The constraints scaled for an oracle with absolute tolerances, with no cost yet."""
    matrix = spelled.matrix.copy()
    exponent = _ROW_EXPONENT - np.frexp(_largest(matrix))[1]
    matrix.data = np.ldexp(matrix.data, np.repeat(exponent, np.diff(matrix.indptr)))
    constraints = Constraints(
        matrix, np.ldexp(spelled.lower, exponent), np.ldexp(spelled.upper, exponent)
    )
    size = matrix.shape[1]
    return _Program(np.zeros(size), np.zeros(size), np.ones(size), constraints)


def _largest(matrix: csr_array) -> Floats:
    """Largest absolute coefficient of each constraint."""
    return np.asarray(abs(matrix).max(axis=1).todense(), dtype=np.float64).ravel()


def _no_mask(pattern: Linear) -> InvalidInput:
    return InvalidInput(
        f"The fixed weights leave no mask: none satisfies the {pattern}; free some of them."
    )


def _json_bound(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
