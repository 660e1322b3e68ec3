"""What every solver is: options, abilities, and one way to be called."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .certificate import Certificate
from .clock import Clock
from .errors import InvalidInput
from .highs import TimeUp, within
from .options import checked_options, checked_seed
from .pattern import Pattern, PerRow
from .problem import MaskProblem
from .solution import ABSOLUTE_GAP, Evidence, MaskSolution, Status, TracePoint, is_closed
from .trivial import trivial_bound


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
    """What a search hands to `Solver.solve`, which evaluates it.

    ``bound`` is float64 ``[rows]``, or ``[1]`` where the rows share a budget; ``evidence`` says
    what it rests on.
    """

    mask: Tensor
    status: Status
    bound: Tensor | None = None
    evidence: Evidence | None = None
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

    def prepare(self, device: torch.device) -> None:  # noqa: B027
        """Import and compile what the search needs on a device, so that no clock sees it."""

    def refuse(self, problem: MaskProblem) -> str | None:
        """Why this problem is too large for this solver, in a sentence; None if it is not."""
        return None

    def make_ready(self, problem: MaskProblem) -> None:
        """Raise `InvalidInput` if this problem is not for this solver here; else `prepare`."""
        reason = self.unable(problem.pattern) or self.refuse(problem)
        if reason is not None:
            raise InvalidInput(reason)
        self.prepare(problem.device)

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
            Seconds; None for no limit. Imports and just-in-time compilation do not count.
        seed
            Of whatever the solver draws at random: a whole number in 0..2^63-1.
        callback
            Told about progress; an exception it raises ends the search.

        Raises
        ------
        InvalidInput
            If the solver cannot handle this pattern or a problem of this size, its library is
            missing, the start does not follow the pattern, the time limit is not positive, or the
            seed is no whole number in its range.
        """
        Clock(time_limit)  # refuses what is no limit before anything is done
        self.make_ready(problem)
        clock = Clock(time_limit)
        start = self._checked_start(problem, start)
        search = Search(problem, start, clock, checked_seed(seed), callback)
        outcome = self._searched(search)
        seconds = clock.seconds

        violation = problem.pattern.violation(outcome.mask)
        if violation is not None:
            raise AssertionError(f"solver '{self.name}' broke the pattern: {violation}")
        mask, objective = outcome.mask, problem.objective(outcome.mask)
        if start is not None:
            mask, objective = _never_worse(search, mask, objective)
        status, bound, scale = outcome.status, None, None
        if status is Status.LOCAL_OPTIMUM and not torch.equal(mask, outcome.mask):
            status = Status.FEASIBLE  # of the start nothing was found out
        if outcome.bound is not None:
            status, bound, scale = self._bounded(problem, mask, objective, outcome)
        return MaskSolution(
            mask=mask,
            objective=objective,
            status=status,
            solver=self.name,
            bound=bound,
            evidence=outcome.evidence,
            scale=scale,
            stats={"time": seconds, **outcome.stats},
            trace=tuple(outcome.trace),
            certificates=tuple(outcome.certificates),
        )

    def _searched(self, search: Search) -> Outcome:
        """The search, whose oracles (`Linear`) end when the clock does."""
        try:
            with within(search.clock):
                return self._search(search)
        except TimeUp:
            if search.start is None:
                raise InvalidInput(
                    f"Solver '{self.name}' found no mask of {search.problem.pattern} within the "
                    "time limit; give a start or more time."
                ) from None
        bound = trivial_bound(search.problem) if self.gives_bound else None
        evidence = Evidence.GUARDED if self.gives_bound else None
        return Outcome(search.start, Status.TIME_LIMIT, bound, evidence)

    def _checked_start(self, problem: MaskProblem, start: Tensor | None) -> Tensor | None:
        """A start that follows the pattern; None where none is given and none is needed."""
        if start is not None:
            start = problem.as_mask(start)
            violation = problem.pattern.violation(start)
            if violation is not None:
                raise InvalidInput(f"The start does not follow the pattern: {violation}.")
        elif self.needs_start:
            raise InvalidInput(f"Solver '{self.name}' needs a start: a mask or a solver's name.")
        return start

    def _bounded(
        self, problem: MaskProblem, mask: Tensor, objective: Tensor, outcome: Outcome
    ) -> tuple[Status, Tensor, Tensor]:
        """Status, bound and scale; the bound is at least the trivial one, the rest follows.

        ``outcome.evidence`` is weakened where a bound without a witness takes the place of one.
        """
        assert outcome.bound is not None
        assert outcome.evidence is not None
        scale, rounding = problem.scale(mask), problem.rounding(mask)
        if problem.pattern.coupled:
            objective, scale, rounding = (
                part.sum().reshape(1) for part in (objective, scale, rounding)
            )
        trivial = trivial_bound(problem)
        bound = torch.maximum(outcome.bound, trivial)
        if outcome.evidence is Evidence.CERTIFIED and bool((bound > outcome.bound).any()):
            outcome.evidence = Evidence.GUARDED
        above = bound - objective
        refuted = above > ABSOLUTE_GAP * scale + rounding
        if outcome.evidence is not Evidence.CLAIMED and bool(refuted.any()):
            raise AssertionError(
                f"solver '{self.name}' gives a bound that its own mask refutes, "
                f"by {float(above.max()):.3g}"
            )
        # What is refuted beyond rounding is worth nothing at all.
        bound = torch.minimum(bound.where(~refuted, trivial), objective - rounding)
        status = outcome.status
        rel_gap = getattr(self, "rel_gap", None)
        if rel_gap is not None:
            if bool(is_closed(objective, bound, scale, rel_gap).all()):
                status = Status.OPTIMAL
            elif status is Status.OPTIMAL:
                status = Status.FEASIBLE
        return status, bound, scale

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


_WARM: set[tuple[str, str]] = set()
_WARMING = threading.Lock()


def warm_up(solver: Solver, device: torch.device) -> None:
    """Solve a tiny problem once in this process, for what it compiles."""
    key = (solver.name, device.type)
    if key in _WARM:
        return
    with _WARMING:
        if key in _WARM:
            return
        random = torch.Generator().manual_seed(0)
        x = torch.randn(12, 48, generator=random)
        weight = torch.randn(2, 12, generator=random).to(device)
        problem = MaskProblem(weight, (x @ x.T).to(device), PerRow(sparsity=0.5))
        start = problem.pattern.lmo(-weight.abs())
        solver._search(Search(problem, start, Clock(), 0, None))
        _WARM.add(key)
