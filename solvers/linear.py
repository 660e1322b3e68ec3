"""Arbitrary linear constraints on the masks of one layer, with a mixed-integer oracle.

Other than for counts per cell, the polytope ``lower <= A m <= upper, 0 <= m <= 1`` has
fractional vertices, so that the convex hull of the masks is smaller than the continuous
relaxation. `Linear.lmo` minimises over the hull (one mixed-integer program per call),
`Linear.lmo_relaxed` over the relaxation (one linear program).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor

from .arrays import floats, sparse_rows
from .errors import InvalidInput, NoMask
from .exact_rows import ExactRows
from .highs import Program, TimeUp, check_time, largest, scaled_cost, time_left
from .pattern import Constraints, Pattern, Shape, _shape

Floats: TypeAlias = npt.NDArray[np.float64]

Bound: TypeAlias = float | Sequence[float] | Floats

_TOLERANCE = 1e-9
"""Allowed excess, relative to the bound or the constraint's largest coefficient."""


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
        "highs" (`solvers.highs`) or "scip" (PySCIPOpt) for `lmo`. `lmo_relaxed` is always HiGHS.

    Raises
    ------
    InvalidInput
        If shapes do not fit, a number is not finite, the oracle is unknown or its library
        missing, or no mask satisfies the constraints.

    Notes
    -----
    A bound gives way by 1e-9 of itself or of the constraint's largest coefficient, whichever
    is larger, so that rounding errors exclude no mask; but a constraint whose coefficients are
    whole numbers, such as counts of parameters, holds exactly. Sums are compared with these bounds
    in exact arithmetic, whatever the sizes of the coefficients (`solvers.exact_rows`). Masks whose
    costs differ by less than 1e-10 of the largest cost are ties to the oracle. Searches that call
    an oracle inside `solvers.highs.within` stop it when their clock runs out.
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
        if oracle not in ("highs", "scip"):
            raise InvalidInput(f"oracle '{oracle}' is neither highs nor scip.")
        if oracle == "scip" and importlib.util.find_spec("pyscipopt") is None:
            raise InvalidInput("The oracle 'scip' needs pyscipopt: pip install pyscipopt.")
        self._oracle = oracle
        self._spelled = _checked(matrix, lower, upper)
        count = len(self._spelled.lower)
        self._names = _checked_names(names) or tuple(f"constraint {i}" for i in range(count))
        if len(self._names) != count:
            raise InvalidInput(f"There are {len(self._names)} names for {count} constraints.")
        self._rows = ExactRows(_widened(self._spelled))
        self._programs: dict[frozenset[int], Program] = {}
        size = self._spelled.matrix.shape[1]
        ends = self._rows.lower, self._rows.upper
        if self._rows.infeasible or self._minimise(np.zeros(size), *ends) is None:
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
        kept = mask.flatten().cpu().numpy()
        low, high = self._rows.violated(kept)
        if not (low | high).any():
            return None
        sums = self._spelled.matrix @ kept.astype(np.float64)
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
        mask = self._minimise(*self._objective(direction, lower, upper))
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
        cost, low, up = self._objective(direction, lower, upper)
        values = self._highs(self._rows.split_at_once, cost, low, up, whole=False)
        if values is None:
            raise _no_mask(self)
        return torch.from_numpy(values[: len(cost)]).view(direction.shape).to(direction.device)

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

    def _objective(
        self, direction: Tensor, lower: Tensor | None, upper: Tensor | None
    ) -> tuple[Floats, Floats, Floats]:
        """Costs and bounds, flat."""
        self.check(_shape(direction))
        if lower is not None and upper is not None and bool((lower & ~upper).any()):
            raise InvalidInput("A weight is fixed both as kept and as pruned; drop one of the two.")
        cost = direction.detach().flatten().cpu().double().numpy()
        if not np.isfinite(cost).all():
            raise InvalidInput("The direction has NaN or infinite values.")
        low = np.zeros(len(cost)) if lower is None else lower.flatten().cpu().double().numpy()
        up = np.ones(len(cost)) if upper is None else upper.flatten().cpu().double().numpy()
        return cost, np.maximum(low, self._rows.lower), np.minimum(up, self._rows.upper)

    def _minimise(self, cost: Floats, lower: Floats, upper: Floats) -> npt.NDArray[np.bool_] | None:
        """The best mask that `violation` accepts; None if there is none.

        Constraints that an oracle's tolerance has overstepped are split into digits, where it
        cannot; so at most one round per constraint.
        """
        solve = self._scip if self._oracle == "scip" else self._highs
        split = self._rows.split_at_once
        careful = False
        while True:
            values = solve(split, cost, lower, upper, careful=careful)
            if values is None:
                return None
            mask = values[: len(cost)] > 0.5
            wrong = np.flatnonzero(np.logical_or(*self._rows.violated(mask)))
            if len(wrong) == 0:
                return mask
            if careful:
                raise InvalidInput(
                    f"The coefficients of {self._names[wrong[0]]} are too different in size for "
                    "the oracle; rescale it or split it in two."
                )
            careful = split.issuperset(wrong.tolist())
            split = split.union(wrong.tolist())

    def _highs(
        self,
        split: frozenset[int],
        cost: Floats,
        lower: Floats,
        upper: Floats,
        *,
        whole: bool = True,
        careful: bool = False,
    ) -> Floats | None:
        """Optimal values of weights, then carries; None if there are none."""
        program = self._program(split)
        extended = self._rows.layout(split).extended(cost, lower, upper)
        return program.minimise(*extended, whole=whole, careful=careful)

    def _scip(
        self,
        split: frozenset[int],
        cost: Floats,
        lower: Floats,
        upper: Floats,
        *,
        careful: bool = False,
    ) -> Floats | None:
        """As `_highs`, for masks."""
        extended = self._rows.layout(split).extended(cost, lower, upper)
        return _scip(self._program(split), *extended)

    def _program(self, split: frozenset[int]) -> Program:
        """The program with these constraints split into digits."""
        if split not in self._programs:
            spelled = self._rows.layout(split).constraints
            self._programs[split] = Program(spelled.matrix, spelled.lower, spelled.upper)
        return self._programs[split]


def _scip(program: Program, cost: Floats, lower: Floats, upper: Floats) -> Floats | None:
    """Optimal values; None if there are none."""
    from pyscipopt import Model, quicksum

    if (lower > upper).any():
        return None
    check_time()
    model = Model()
    model.hideOutput()
    model.setParam("numerics/feastol", 1e-9)
    model.setParam("limits/time", min(time_left(), 1e20))
    x = [
        model.addVar(vtype="I", lb=low, ub=up, obj=one)
        for one, low, up in zip(scaled_cost(cost)[0], lower, upper, strict=True)
    ]
    matrix = program.matrix
    for i, (low, up) in enumerate(zip(program.least, program.most, strict=True)):
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
    if model.getStatus() == "timelimit":
        raise TimeUp
    if model.getStatus() != "optimal":
        raise RuntimeError(f"SCIP found no answer: {model.getStatus()}")
    return np.array([model.getVal(value) for value in x])


def _checked(matrix: Any, lower: Bound, upper: Bound) -> Constraints:
    """Read-only float64 copies, or `InvalidInput`."""
    matrix = sparse_rows(matrix, "The constraints")
    if 0 in matrix.shape:
        raise InvalidInput(
            f"The constraints have shape {tuple(matrix.shape)}; give a non-empty matrix "
            "[constraints, weights]."
        )
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


def _checked_names(names: Any) -> tuple[str, ...]:
    """Names of constraints, perhaps none, or `InvalidInput`."""
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InvalidInput(f"names={names!r} must be a list of one text per constraint.")
    found = tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise InvalidInput(f"The name {name!r} of a constraint must be text.")
    return found


def _one_per_row(bound: Bound, count: int) -> Floats:
    values = floats(bound, "A bound")
    if values.shape not in ((), (count,)):
        raise InvalidInput(f"A bound has shape {values.shape}; there are {count} constraints.")
    return np.full(count, values)


def _widened(spelled: Constraints) -> Constraints:
    """Bounds that rounding errors do not cross; whole numbers for sums of whole numbers."""
    matrix, lower, upper = spelled.matrix, spelled.lower, spelled.upper
    fractional = csr_array((matrix.data % 1, matrix.indices, matrix.indptr), shape=matrix.shape)
    whole = largest(fractional) == 0
    slack_lower, slack_upper = (
        _TOLERANCE * np.maximum(largest(matrix), np.where(np.isfinite(bound), abs(bound), 0.0))
        for bound in (lower, upper)
    )
    # A bound that is whole stays as it is: half of one would be rounded away or up beyond 2^52.
    half_lower, half_upper = (
        np.where(np.rint(bound) == bound, 0.0, slack.clip(max=0.5))
        for bound, slack in ((lower, slack_lower), (upper, slack_upper))
    )
    return Constraints(
        matrix,
        np.where(whole, np.ceil(lower - half_lower), lower - slack_lower),
        np.where(whole, np.floor(upper + half_upper), upper + slack_upper),
    )


def _no_mask(pattern: Linear) -> NoMask:
    return NoMask(
        f"The fixed weights leave no mask: none satisfies the {pattern}; free some of them."
    )


def _json_bound(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
