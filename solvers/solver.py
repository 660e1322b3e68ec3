"""What every solver is: options, abilities, and one way to be called."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from .certificate import Certificate
from .clock import Clock
from .errors import InvalidInput
from .options import checked_options, checked_seed
from .pattern import Pattern
from .problem import MaskProblem
from .solution import MaskSolution, Status, TracePoint


@dataclass(frozen=True)
class Progress:
    """What a callback is told: rows finished so far, and the seconds it took."""

    done: int
    total: int
    time: float


Callback = Callable[[Progress], None]


@dataclass(frozen=True)
class Search:
    """What one call of `Solver.solve` asks for.

    Attributes
    ----------
    problem
        The rows to solve.
    start
        A mask that follows the pattern, bool ``[rows, d]``, or None.
    clock
        Running, with the time limit.
    seed
        Of whatever is drawn at random.
    callback
        To be told about progress, or None.
    """

    problem: MaskProblem
    start: Tensor | None
    clock: Clock
    seed: int
    callback: Callback | None

    @cached_property
    def start_objective(self) -> Tensor:
        """Loss of every row at the start, float64 ``[rows]``."""
        assert self.start is not None
        return self.problem.objective(self.start)


@dataclass
class Outcome:
    """What a search hands to `Solver.solve`, which evaluates it."""

    mask: Tensor
    status: Status
    bound: Tensor | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    trace: list[TracePoint] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)


class Solver(ABC):
    """A way to choose masks. Subclasses are dataclasses whose fields are the options.

    Class attributes state what the solver can do, so that it can be listed and refused
    without being run. ``rowwise``: where rows share no budget, some of them solved apart get the
    masks that they get together with the others. ``ignores_linear``: whether it chooses masks as
    if the problem had no linear term.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    patterns: ClassVar[tuple[type[Pattern], ...]]
    exact: ClassVar[bool] = False
    rowwise: ClassVar[bool] = False
    ignores_linear: ClassVar[bool] = False
    gives_bound: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False
    composite: ClassVar[bool] = False
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        checked_options(self, f"Solver '{self.name}'")

    @abstractmethod
    def _search(self, search: Search) -> Outcome:
        """Choose a mask; `solve` checks, times and evaluates around it."""

    def solve(
        self,
        problem: MaskProblem,
        *,
        start: Tensor | None = None,
        time_limit: float | None = None,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> MaskSolution:
        """Solve, and evaluate the answer in float64. A start is never made worse.

        Parameters
        ----------
        problem
            The rows to solve.
        start
            A mask that follows the pattern, bool ``[rows, d]``.
        time_limit
            Seconds; None for no limit.
        seed
            Of whatever the solver draws at random: a whole number in 0..2^63-1.
        callback
            Told about progress; an exception it raises ends the search.

        Raises
        ------
        InvalidInput
            If the solver cannot handle this pattern, its library is missing, the start does
            not follow the pattern, the time limit is not positive, or the seed is no whole
            number in its range.
        """
        reason = self.unable(problem.pattern)
        if reason is not None:
            raise InvalidInput(reason)
        if start is not None:
            start = problem.as_mask(start)
            violation = problem.pattern.violation(start)
            if violation is not None:
                raise InvalidInput(f"The start does not follow the pattern: {violation}.")
        elif self.needs_start:
            raise InvalidInput(f"Solver '{self.name}' needs a start: a mask or a solver's name.")
        search = Search(problem, start, Clock(time_limit), checked_seed(seed), callback)
        outcome = self._search(search)
        seconds = search.clock.seconds

        violation = problem.pattern.violation(outcome.mask)
        if violation is not None:
            raise AssertionError(f"solver '{self.name}' broke the pattern: {violation}")
        mask, objective = outcome.mask, problem.objective(outcome.mask)
        if start is not None:
            mask, objective = _never_worse(search, mask, objective)
        return MaskSolution(
            mask=mask,
            objective=objective,
            status=outcome.status,
            solver=self.name,
            bound=outcome.bound,
            stats={"time": seconds, **outcome.stats},
            trace=tuple(outcome.trace),
            certificates=tuple(outcome.certificates),
        )

    @classmethod
    def unable(cls, pattern: Pattern | None = None) -> str | None:
        """Why this solver cannot run here (or on this pattern), in a sentence; None if it can."""
        for module in cls.requires:
            if importlib.util.find_spec(module) is None:
                return f"Solver '{cls.name}' needs {module}: pip install {module}."
        if pattern is not None and not isinstance(pattern, cls.patterns):
            from .registry import available_for  # the registry knows this module

            able = ", ".join(available_for(pattern)) or "none"
            return f"Solver '{cls.name}' cannot do the pattern {pattern}; these can: {able}."
        return None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Names of the options that `solve` takes as keywords."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]


def _never_worse(search: Search, mask: Tensor, objective: Tensor) -> tuple[Tensor, Tensor]:
    """Take the start back wherever the search ended above it."""
    start, before = search.start, search.start_objective
    assert start is not None
    if search.problem.pattern.coupled:
        if float(objective.sum()) > float(before.sum()):
            return start.clone(), before
        return mask, objective
    worse = objective > before
    if bool(worse.any()):
        mask = mask.where(~worse[:, None], start)
        objective = objective.where(~worse, before)
    return mask, objective
