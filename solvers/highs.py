"""Linear and mixed-integer programs through HiGHS: the one place that calls it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from .clock import Clock
from .rounding import gamma

if TYPE_CHECKING:
    from highspy import Highs

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_ROW_EXPONENT = 10
"""HiGHS sees coefficients up to 2**10: its absolute tolerance of 1e-6 is then 1e-9 of them."""

_COST_EXPONENT = 16
"""HiGHS sees costs up to 2**16, so that its absolute gap of 1e-6 is some 2e-11 of them."""

_INFINITE = 1e19
"""HiGHS takes bounds from 1e20 on for infinite; larger ones of ours are decided beforehand."""

_OUTSIDE = 1e-5
"""How far a point may lie outside of a bound or of a scaled constraint, and from whole numbers."""

_USUAL: dict[str, Any] = {
    "presolve": "off",
    "random_seed": 0,
    "primal_feasibility_tolerance": 1e-7,
    "mip_feasibility_tolerance": 1e-6,
}

_CAREFUL: dict[str, Any] = {
    "presolve": "off",
    "random_seed": 1,
    "primal_feasibility_tolerance": 1e-10,
    "mip_feasibility_tolerance": 1e-10,
}
"""For a second opinion."""


class TimeUp(Exception):
    """The clock of the search that asked has run out; searches catch it, users never see it."""


_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def within(clock: Clock) -> Iterator[None]:
    """Programs solved in this context raise `TimeUp` when the clock has run out.

    The context belongs to the thread, so that oracles need no argument for it. Of contexts in one
    another, the one that ends first counts.
    """
    outer = _clock.get()
    token = _clock.set(clock if outer is None or clock.remaining < outer.remaining else outer)
    try:
        yield
    finally:
        _clock.reset(token)


def time_left() -> float:
    """Seconds that the context's clock leaves; infinite without one."""
    clock = _clock.get()
    return np.inf if clock is None else clock.remaining


def check_time() -> None:
    """Raise `TimeUp` if the context's clock has run out."""
    clock = _clock.get()
    if clock is not None and clock.expired:
        raise TimeUp


class Program:
    """``min cost @ x`` subject to ``least <= matrix @ x <= most``, ``lower <= x <= upper``.

    The constraints stay, costs and bounds change from call to call. Each thread has a HiGHS
    object of its own, which keeps the constraints but nothing else: an answer depends on the
    arguments alone, not on earlier calls.

    Parameters
    ----------
    matrix
        ``[constraints, n]``, finite.
    least, most
        ``[constraints]``; infinite where there is no bound.
    integer
        Bool ``[n]``: which variables are whole in `minimise`; None for all.

    Attributes
    ----------
    matrix, least, most
        The constraints as HiGHS sees them: each times a power of two, so that its largest
        coefficient suits absolute tolerances.

    Notes
    -----
    What is believed of HiGHS: a point, after its bounds, constraints and whole numbers were
    checked (to 1e-5 in HiGHS's scale; callers with exact constraints check those). That a linear
    program has no point, if its dual ray proves it in float64 with a rounding guard (Farkas), or
    the bounds alone do. That a mixed-integer program has none, if its relaxation has none by such
    a proof, or if a second run with another seed and tolerances of 1e-10 says so too. That a
    point is optimal: HiGHS's word, whose tolerance is some 1e-9 of the largest cost.
    """

    def __init__(
        self, matrix: csr_array, least: Floats, most: Floats, integer: Bools | None = None
    ) -> None:
        self.n = matrix.shape[1]
        self.integer = np.ones(self.n, dtype=bool) if integer is None else integer
        exponent = _ROW_EXPONENT - np.frexp(largest(matrix))[1]
        self._exponent = exponent
        self.matrix = csr_array(matrix, dtype=np.float64, copy=True)
        self.matrix.data = np.ldexp(
            self.matrix.data, np.repeat(exponent, np.diff(self.matrix.indptr))
        )
        with np.errstate(over="ignore"):
            self.least, self.most = np.ldexp(least, exponent), np.ldexp(most, exponent)
        self._absolute = abs(self.matrix)
        self._index = np.arange(self.n, dtype=np.int32)
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def minimise(
        self,
        cost: Floats,
        lower: Floats,
        upper: Floats,
        *,
        whole: bool = True,
        careful: bool = False,
    ) -> Floats | None:
        """An optimal point, float64 ``[n]``; None if there is no point.

        Parameters
        ----------
        cost, lower, upper
            Float64 ``[n]``; bounds finite.
        whole
            Whether integer variables are whole; they are then exactly so in the answer.
        careful
            Whether to use tolerances of 1e-10.

        Raises
        ------
        TimeUp
            If the clock of `within` has run out.
        RuntimeError
            If HiGHS gives no answer that can be believed.
        """
        check_time()
        whole = whole and bool(self.integer.any())
        if self._without_point(lower, upper):
            return None
        scaled, _ = scaled_cost(cost)
        said = ""
        for care in (True,) if careful else (False, True):
            found, said = self._run(scaled, lower, upper, whole, care)
            if found is not None:
                return found
            if said == "Infeasible" and self._no_relaxed_point(lower, upper, whole, care):
                return None
        if said == "Infeasible" and whole:
            return None
        raise RuntimeError(f"HiGHS found no answer that can be believed: {said}.")

    def multipliers(self, cost: Floats, lower: Floats, upper: Floats) -> Floats | None:
        """Multipliers of the constraints as given, float64 ``[constraints]``, of the relaxation.

        ``y`` with ``cost - matrix^T y`` the reduced costs; ``y_i > 0`` only where ``least_i`` is
        finite, ``y_i < 0`` only where ``most_i`` is. None if HiGHS has none.
        """
        check_time()
        if self._without_point(lower, upper):
            return None
        scaled, exponent = scaled_cost(cost)
        model = self._model(False, False)
        if self._status(False, model, scaled, lower, upper) != "Optimal":
            return None
        y = np.array(model.getSolution().row_dual, dtype=np.float64)
        y[~np.isfinite(y)] = 0.0
        return np.asarray(np.ldexp(self._signed(y), self._exponent - exponent))

    def _run(
        self, cost: Floats, lower: Floats, upper: Floats, whole: bool, careful: bool
    ) -> tuple[Floats | None, str]:
        """A checked point, or None; and what HiGHS said."""
        model = self._model(whole, careful)
        said = self._status(whole, model, cost, lower, upper)
        if said != "Optimal":
            return None, said
        point = np.array(model.getSolution().col_value, dtype=np.float64)
        if whole:
            rounded = np.where(self.integer, np.rint(point), point)
            if not np.abs(rounded - point).max() <= _OUTSIDE:
                return None, "a point with fractions"
            point = rounded
        if not ((point >= lower - _OUTSIDE) & (point <= upper + _OUTSIDE)).all():
            return None, "a point outside of its bounds"
        sums = self.matrix @ point
        slack = _OUTSIDE * (1.0 + self._absolute @ np.abs(point))
        if not ((sums >= self.least - slack) & (sums <= self.most + slack)).all():
            return None, "a point outside of the constraints"
        return point.clip(lower, upper), said

    def _without_point(self, lower: Floats, upper: Floats) -> bool:
        """Whether the bounds alone leave no point, by the smallest and largest sums."""
        if (lower > upper).any():
            return True
        # sums = matrix @ middle +- |matrix| @ half
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        centre, reach = self.matrix @ middle, self._absolute @ half
        reach += gamma(self.n + 4) * (self._absolute @ (np.abs(middle) + half))
        return bool(((centre - reach > self.most) | (centre + reach < self.least)).any())

    def _no_relaxed_point(self, lower: Floats, upper: Floats, whole: bool, careful: bool) -> bool:
        """Whether a dual ray proves that the continuous relaxation has no point (Farkas)."""
        model = self._model(False, careful)
        if whole and self._status(False, model, np.zeros(self.n), lower, upper) != "Infeasible":
            return False
        _, exists, ray = model.getDualRay()
        if not exists or len(ray) != len(self.least) or not np.isfinite(ray).all():
            return False
        ray = ray / (np.abs(ray).max() or 1.0)
        return any(self._is_farkas(self._signed(y), lower, upper) for y in (ray, -ray))

    def _is_farkas(self, y: Floats, lower: Floats, upper: Floats) -> bool:
        """Whether ``y @ matrix @ x`` stays below ``y @ sides`` all over the box.

        Every point has ``y @ matrix @ x >= y @ sides`` with ``sides_i = least_i`` where ``y_i``
        is positive and ``most_i`` where it is negative.
        """
        used = y != 0
        sides = np.where(y > 0, self.least, self.most)[used]
        needed = float(y[used] @ sides)
        combined = self.matrix.T @ y
        most = float(combined @ np.where(combined > 0, upper, lower))
        size = np.abs(y[used]) @ np.abs(sides)
        size += (self._absolute.T @ np.abs(y)) @ np.maximum(np.abs(lower), np.abs(upper))
        # Sums over constraints inside of sums over variables.
        return bool(most + 2 * gamma(self.n + len(y) + 4) * float(size) < needed)

    def _signed(self, y: Floats) -> Floats:
        """Multipliers without those that ask for an infinite bound."""
        wrong = ((y > 0) & np.isinf(self.least)) | ((y < 0) & np.isinf(self.most))
        return np.where(wrong, 0.0, y)

    def _model(self, whole: bool, careful: bool) -> Highs:
        """HiGHS object of this thread for these settings."""
        name = f"{whole}, {careful}"
        model: Highs | None = getattr(self._local, name, None)
        if model is None:
            model = self._new(whole, _CAREFUL if careful else _USUAL)
            setattr(self._local, name, model)
        return model

    def _new(self, whole: bool, settings: dict[str, Any]) -> Highs:
        from highspy import Highs

        model = Highs()
        options = {
            "output_flag": False,
            "log_to_console": False,
            "parallel": "off",
            "mip_rel_gap": 0.0,
            **settings,
        }
        for name, value in options.items():
            model.setOptionValue(name, value)
        matrix = self.matrix
        size = len(self.least)
        types = self.integer.astype(np.int32) if whole else np.zeros(self.n, dtype=np.int32)
        model.passModel(
            self.n,
            size,
            matrix.nnz,
            2,  # by rows
            1,  # minimise
            0.0,
            np.zeros(self.n),
            np.zeros(self.n),
            np.ones(self.n),
            np.where(np.abs(self.least) < _INFINITE, self.least, -np.inf),
            np.where(np.abs(self.most) < _INFINITE, self.most, np.inf),
            matrix.indptr.astype(np.int32),
            matrix.indices.astype(np.int32),
            matrix.data,
            types,
        )
        return model

    def _status(self, whole: bool, model: Highs, cost: Floats, lower: Floats, upper: Floats) -> str:
        """Solve; HiGHS's status in words, "Infeasible" also for what it thinks unbounded."""
        from highspy import HighsModelStatus, HighsStatus

        model.clearSolver()  # what it learnt before must not change the answer
        model.changeColsCost(self.n, self._index, cost)
        model.changeColsBounds(self.n, self._index, lower, upper)
        limit = time_left()
        # Simplex counts the time of all runs of the object, the other solver that of this one.
        for before in sorted((0.0, model.getRunTime()), reverse=not whole):
            model.setOptionValue("time_limit", before + limit)
            if model.run() == HighsStatus.kError:
                return "error"
            status = model.getModelStatus()
            if status in (HighsModelStatus.kInfeasible, HighsModelStatus.kUnboundedOrInfeasible):
                return "Infeasible"
            if status != HighsModelStatus.kTimeLimit:
                return str(model.modelStatusToString(status))
            check_time()
        raise TimeUp


def scaled_cost(cost: Floats) -> tuple[Floats, int]:
    """Costs times a power of two that suits absolute tolerances, and its exponent."""
    exponent = _COST_EXPONENT - int(np.frexp(np.abs(cost).max(initial=0.0))[1])
    return np.ldexp(cost, exponent), exponent


def largest(matrix: csr_array) -> Floats:
    """Largest absolute coefficient of each constraint."""
    if 0 in matrix.shape:
        return np.zeros(matrix.shape[0])
    return np.asarray(abs(matrix).max(axis=1).todense(), dtype=np.float64).ravel()
