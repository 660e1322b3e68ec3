"""Solvers made of solvers: one after another, the best of several, and restarts.

A member is a solver's name, or a pair of its name and a dictionary of its options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .clock import Clock
from .errors import InvalidInput
from .frank_wolfe import FrankWolfe, relaxed_mask
from .options import option
from .pattern import NM, CellPattern, PerLayer, PerRow
from .problem import MaskProblem
from .registry import DEFAULT_START, get_solver, register
from .solution import MaskSolution, Status, TracePoint
from .solver import Outcome, Search, Solver
from .swap import Swap

Member = str | Sequence[Any]
"""``name`` or ``(name, options)``."""


@register
@dataclass(frozen=True)
class Chain(Solver):
    """Solvers one after another, each from the mask of the one before.

    Parameters
    ----------
    stages
        Members in order. The first one begins at the start, if there is one. A stage that does
        not end by itself, such as "tabu" without a number of iterations, takes all the time left.

    Notes
    -----
    ``stats``: ``stages``, a list with name, summed loss and seconds of each.
    """

    stages: Sequence[Member] = ("frank_wolfe", "tabu")

    name = "chain"
    summary = "solvers one after another, each from the mask before"
    patterns = (PerRow, NM, PerLayer)
    composite = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _members(self.stages)

    def prepare(self, device: torch.device) -> None:
        for solver in _members(self.stages):
            solver.prepare(device)

    def _search(self, search: Search) -> Outcome:
        clock = search.clock
        mask, trace, stats = search.start, list[TracePoint](), []
        status = Status.FEASIBLE
        for solver in _members(self.stages):
            if mask is not None and clock.expired:
                status = Status.TIME_LIMIT
                break
            began = clock.seconds
            solution = _run(solver, search, mask, clock)
            _extend(trace, solution.trace, began)
            mask, status = solution.mask, solution.status
            loss = float(solution.objective.sum())
            trace.append(TracePoint(clock.seconds, _capped(trace, loss)))
            stats.append({"solver": solver.name, "loss": loss, "seconds": clock.seconds - began})
        assert mask is not None
        return Outcome(mask, status, stats={"stages": stats}, trace=trace)


@register
@dataclass(frozen=True)
class BestOf(Solver):
    """Several solvers from the same start; of each row the best mask.

    Where rows share a budget, the best mask of the whole layer.

    Parameters
    ----------
    members
        The solvers. A time limit is shared out evenly among those still to come.

    Notes
    -----
    ``stats``: ``members``, a list with name, summed loss, seconds and ``rows`` won of each.
    """

    members: Sequence[Member] = ("swap", ("chain", {"stages": ["frank_wolfe", "swap"]}))

    name = "best_of"
    summary = "several solvers, of each row the best mask"
    patterns = (PerRow, NM, PerLayer)
    composite = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _members(self.members)

    def prepare(self, device: torch.device) -> None:
        for solver in _members(self.members):
            solver.prepare(device)

    def _search(self, search: Search) -> Outcome:
        problem, clock = search.problem, search.clock
        best = _Best(problem)
        stats, trace = [], list[TracePoint]()
        solvers = _members(self.members)
        for at, solver in enumerate(solvers):
            if at and clock.expired:
                break
            began = clock.seconds
            share = clock.part(1 / (len(solvers) - at))
            solution = _run(solver, search, search.start, share)
            won = best.offer(solution)
            trace.append(TracePoint(clock.seconds, best.loss))
            stats.append(
                {
                    "solver": solver.name,
                    "loss": float(solution.objective.sum()),
                    "seconds": clock.seconds - began,
                    "rows": won,
                }
            )
        status = Status.TIME_LIMIT if clock.expired else Status.FEASIBLE
        return Outcome(best.mask, status, stats={"members": stats}, trace=trace)


@register
@dataclass(frozen=True)
class Restarts(Solver):
    """Swap searches from random roundings of the relaxation's minimiser; the best mask of each row.

    The Frank-Wolfe point ``z`` says how sure the relaxation is of each weight. A rounding keeps,
    of every cell, the weights with the largest ``logit(z) + noise * Gumbel``: with noise 1 a
    sample without replacement with odds ``z / (1 - z)``, with noise 0 the nearest mask, which is
    where the first search begins.

    Parameters
    ----------
    restarts
        Roundings.
    noise
        Spread of the roundings.
    """

    restarts: int = option(8, least=1)
    noise: float = option(0.5, least=0)

    name = "restarts"
    summary = "swap searches from random roundings of the Frank-Wolfe point"
    patterns = (PerRow, NM, PerLayer)
    composite = True

    def prepare(self, device: torch.device) -> None:
        Swap().prepare(device)

    def _search(self, search: Search) -> Outcome:
        problem, clock = search.problem, search.clock
        assert isinstance(problem.pattern, CellPattern)
        z = relaxed_mask(problem, FrankWolfe(), clock).clamp(1e-3, 1 - 1e-3)
        score = z.logit()
        generator = torch.Generator().manual_seed(search.seed)
        best, trace, done = _Best(problem), [], 0
        while done < self.restarts and not (done and clock.expired):
            uniform = torch.rand(score.shape, generator=generator, dtype=torch.float64)
            gumbel = -(-uniform.clamp_min(1e-300).log()).clamp_min(1e-300).log()
            noise = self.noise * gumbel.to(score.device) if done else 0.0
            rounded = problem.pattern.round(score + noise)
            best.offer(_run(Swap(), search, rounded, clock))
            trace.append(TracePoint(clock.seconds, best.loss))
            done += 1
        status = Status.TIME_LIMIT if clock.expired else Status.FEASIBLE
        return Outcome(best.mask, status, stats={"restarts": done}, trace=trace)


class _Best:
    """Of several solutions the best mask of each row, or of the layer where rows share a budget."""

    def __init__(self, problem: MaskProblem) -> None:
        self._coupled = problem.pattern.coupled
        self.mask = torch.empty(0)
        self._objective: Tensor | None = None

    @property
    def loss(self) -> float:
        """Summed loss."""
        assert self._objective is not None
        return float(self._objective.sum())

    def offer(self, solution: MaskSolution) -> int:
        """Take what is better; in how many rows it was."""
        if self._objective is None:
            self.mask, self._objective = solution.mask, solution.objective
            return len(solution.mask)
        won = solution.objective < self._objective
        if self._coupled:
            won = (solution.objective.sum() < self._objective.sum()).expand_as(won)
        self.mask = torch.where(won[:, None], solution.mask, self.mask)
        self._objective = torch.where(won, solution.objective, self._objective)
        return int(won.sum())


def _members(members: Sequence[Member]) -> list[Solver]:
    """The solvers that members name."""
    if isinstance(members, str):
        members = [name.strip() for name in members.split(",")]
    if not isinstance(members, Sequence):
        raise InvalidInput(f"{members!r} is no list of solvers; give names, or (name, options).")
    if not members:
        raise InvalidInput("A composition needs at least one solver.")
    found = []
    for member in members:
        if isinstance(member, str):
            found.append(get_solver(member))
        elif _is_pair(member):
            found.append(get_solver(member[0], **member[1]))
        else:
            raise InvalidInput(f"{member!r} is neither a solver's name nor a pair (name, options).")
    return found


def _is_pair(member: Any) -> TypeGuard[tuple[str, dict[str, Any]]]:
    """Whether it is a name with options."""
    return (
        isinstance(member, Sequence)
        and len(member) == 2
        and isinstance(member[0], str)
        and isinstance(member[1], dict)
        and all(isinstance(key, str) for key in member[1])
    )


def _run(solver: Solver, search: Search, start: Tensor | None, clock: Clock) -> MaskSolution:
    """A member's answer, in the clock's time."""
    problem, seed = search.problem, search.seed
    if start is None and solver.needs_start:
        start = get_solver(DEFAULT_START).solve(problem, time_limit=clock.limit, seed=seed).mask
    return solver.solve(
        problem, start=start, time_limit=clock.limit, seed=seed, callback=search.callback
    )


def _capped(trace: list[TracePoint], value: float) -> float:
    return min(value, trace[-1].objective) if trace else value


def _extend(trace: list[TracePoint], points: Sequence[TracePoint], began: float) -> None:
    """Append a stage's trace at its place in time, never rising."""
    for point in points:
        trace.append(TracePoint(began + point.time, _capped(trace, point.objective)))
