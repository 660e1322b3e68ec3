"""Several solvers on the same problem: their masks, their bounds, and each mask's gap.

A bound holds for a row whoever found it. So the gap of every mask is taken to the best bound
that any of the solvers gave, and a heuristic without a bound of its own still gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from solvers import (
    Evidence,
    InvalidInput,
    MaskProblem,
    MaskSolution,
    Pattern,
    Progress,
    Solver,
    get_solver,
    solve,
)
from solvers.clock import Clock
from solvers.saliency import Saliency
from solvers.solution import ABSOLUTE_GAP, relative_gap

from .environment import environment

Observer: TypeAlias = Callable[[str, Progress], None]
"""Told the name of the solver at work, and its progress."""

_REFUTED = 1e-6
"""A bound this far above a mask's loss, relatively, is no rounding error but wrong."""


@dataclass(frozen=True)
class Comparison:
    """What several solvers made of one problem.

    Numbers come per *unit*, which is what has a budget of its own: a row, or all rows together
    if they share one. Differences below `solvers.solution.ABSOLUTE_GAP` of a unit's scale are
    none, so that a loss of zero has a gap.

    Attributes
    ----------
    settings, environment
        What was asked for, and of which machine.
    pattern
        The problem's.
    scale
        `MaskProblem.scale` of every unit, float64 ``[units]``.
    solutions
        By solver, in the order asked for.
    refused
        Why a solver did not run, by solver.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    pattern: Pattern
    scale: Tensor
    solutions: dict[str, MaskSolution]
    refused: dict[str, str]

    def loss(self, solver: str) -> Tensor:
        """Loss of a solver's mask, float64 ``[units]``."""
        loss = self.solutions[solver].objective
        return loss.sum().reshape(1) if self.pattern.coupled else loss

    def bound(self, solver: str) -> Tensor:
        """A solver's own bound, float64 ``[units]``; NaN where it has none."""
        bound = self.solutions[solver].bound
        return torch.full_like(self.scale, torch.nan) if bound is None else bound

    def evidence(self, solver: str) -> Evidence | None:
        """What a solver's own bound rests on; None if it has none."""
        return self.solutions[solver].evidence

    def gap(self, solver: str) -> Tensor:
        """``(loss - best_bound) / |loss|``, float64 ``[units]``; NaN without any bound."""
        return relative_gap(self.loss(solver), self.best_bound, self.scale)

    def ratio(self, solver: str) -> Tensor:
        """Loss relative to the best found, 1 being the best, float64 ``[units]``."""
        best = self.best_loss
        excess = self.loss(solver) - best
        return 1 + torch.where(excess <= ABSOLUTE_GAP * self.scale, 0.0, excess / best.abs())

    @property
    def best_loss(self) -> Tensor:
        """Least loss that any solver found, float64 ``[units]``."""
        return torch.stack([self.loss(solver) for solver in self.solutions]).amin(dim=0)

    @property
    def best_bound(self) -> Tensor:
        """Best bound of any solver that no mask refutes, float64 ``[units]``; NaN without one.

        Of those that only rounding tells apart, the one with the strongest evidence. Never above
        `best_loss`: what rounding leaves above it is cut off.
        """
        return self._best[0]

    @property
    def best_evidence(self) -> list[Evidence | None]:
        """What each of `best_bound` rests on; None without one."""
        return self._best[1]

    @property
    def best_gap(self) -> Tensor:
        """Gap of the best mask of each unit, float64 ``[units]``; NaN without any bound."""
        return relative_gap(self.best_loss, self.best_bound, self.scale)

    @property
    def refuted(self) -> dict[str, int]:
        """Solvers whose bound lies above the loss of a mask, and for how many units."""
        counts = {solver: int(self._refuted(solver).sum()) for solver in self.solutions}
        return {solver: count for solver, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, without the masks themselves. NaN stands for "no bound"."""
        return {
            "format": 2,
            "settings": self.settings,
            "environment": self.environment,
            "gaps_are_per": "layer" if self.pattern.coupled else "row",
            "best": {
                "objective": self.best_loss.tolist(),
                "bound": self.best_bound.tolist(),
                "evidence": [_name(evidence) for evidence in self.best_evidence],
                "gap": self.best_gap.tolist(),
            },
            "solvers": {solver: self._solver_to_dict(solver) for solver in self.solutions},
            "refused": self.refused,
            "refuted": {
                solver: {"units": count, "evidence": _name(self.evidence(solver))}
                for solver, count in self.refuted.items()
            },
        }

    def _solver_to_dict(self, solver: str) -> dict[str, Any]:
        solution = self.solutions[solver]
        own_gap = relative_gap(self.loss(solver), self.bound(solver), self.scale)
        return {
            "objective": solution.objective.tolist(),
            "bound": None if solution.bound is None else solution.bound.tolist(),
            "evidence": _name(solution.evidence),
            "gap": self.gap(solver).tolist(),
            "own_gap": None if solution.bound is None else own_gap.tolist(),
            "status": solution.status.name,
            "seconds": solution.stats["time"],
            "stats": solution.stats,
            "trace": [asdict(point) for point in solution.trace],
        }

    @cached_property
    def _best(self) -> tuple[Tensor, list[Evidence | None]]:
        """`best_bound` and `best_evidence`."""
        none = torch.full_like(self.best_loss, torch.nan)
        credible = {
            solver: self.bound(solver).masked_fill(self._refuted(solver), torch.nan)
            for solver in self.solutions
        }
        bound = none
        for own in credible.values():
            bound = torch.fmax(bound, own)
        near = bound - ABSOLUTE_GAP * self.scale
        evidence: list[Evidence | None] = [None] * len(bound)
        for kind in reversed(Evidence):  # the strongest comes last, and stays
            best = none
            for solver, own in credible.items():
                if self.evidence(solver) is kind:
                    best = torch.fmax(best, own)
            reached = best >= near
            bound = best.where(reached, bound)
            evidence = [kind if r else old for r, old in zip(reached, evidence, strict=True)]
        return torch.minimum(bound, self.best_loss), evidence

    def _refuted(self, solver: str) -> Tensor:
        best = self.best_loss
        return self.bound(solver) - best > _REFUTED * best.abs() + ABSOLUTE_GAP * self.scale


def compare(
    problem: MaskProblem,
    solvers: Sequence[str],
    *,
    start: str | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> Comparison:
    """Run several solvers on one problem, one after another.

    Imports and just-in-time compilation are not part of a solver's time.

    Parameters
    ----------
    problem
        The rows to solve.
    solvers
        Names out of `solvers.available`. One that cannot run is recorded with the reason.
    start
        Solver whose mask all but the closed-form saliencies start from; it is not part of their
        time. None leaves the start to each solver.
    time_limit
        Seconds per solver, for all rows together; None for no limit.
    seed
        Of whatever is drawn at random.
    observer
        Told about progress.

    Raises
    ------
    InvalidInput
        If a name is unknown, the time limit is not positive, the start cannot be had, or none of
        the solvers can run.
    """
    if not solvers:
        raise InvalidInput("There is nothing to compare; name at least one solver.")
    chosen = {name: get_solver(name) for name in solvers}
    Clock(time_limit)  # refuses a limit that is not positive before anything is run
    reasons = {name: solver.unable(problem.pattern) for name, solver in chosen.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    _check_any_left(chosen, refused)
    mask = None
    if start is not None:
        mask = solve(problem, start, time_limit=time_limit, seed=seed).mask

    solutions = {}
    for name, solver in chosen.items():
        if name in refused:
            continue
        if observer is not None:
            observer(name, Progress(0, problem.shape[0], 0.0))
        solver.prepare(problem.device)
        try:
            solutions[name] = solve(
                problem,
                name,
                start=None if isinstance(solver, Saliency) else mask,
                time_limit=time_limit,
                seed=seed,
                callback=None if observer is None else _told(observer, name),
            )
        except InvalidInput as error:
            refused[name] = str(error)
    _check_any_left(chosen, refused)
    # Of each row the smallest: no two numbers count as equal that do not for every mask.
    scale = torch.stack([problem.scale(found.mask) for found in solutions.values()]).amin(dim=0)
    return Comparison(
        settings={
            "solvers": list(chosen),
            "pattern": problem.pattern.to_dict(),
            "rows": problem.shape[0],
            "inputs": problem.shape[1],
            "start": start,
            "time_limit": time_limit,
            "seed": seed,
        },
        environment=environment(
            problem.device, (module for solver in chosen.values() for module in solver.requires)
        ),
        pattern=problem.pattern,
        scale=scale.sum().reshape(1) if problem.pattern.coupled else scale,
        solutions=solutions,
        refused={name: refused[name] for name in chosen if name in refused},
    )


def part(
    problem: MaskProblem, pattern: Pattern, rows: int | None = None, inputs: int | None = None
) -> MaskProblem:
    """The first rows and inputs of a problem, as a problem of its own.

    Parameters
    ----------
    problem
        The whole; its own pattern plays no part.
    pattern
        Of the part.
    rows, inputs
        How many; None for all.

    Raises
    ------
    InvalidInput
        If there are not as many, or the pattern does not fit them.
    """
    sizes = []
    for name, wanted, there in zip(("rows", "inputs"), (rows, inputs), problem.shape, strict=True):
        if wanted is not None and not 0 < wanted <= there:
            raise InvalidInput(f"The problem has {there} {name}; {wanted} cannot be taken of them.")
        sizes.append(there if wanted is None else wanted)
    n, d = sizes
    linear = None if problem.linear is None else problem.linear[:n, :d]
    return MaskProblem(problem.weight[:n, :d], problem.gram[:d, :d], pattern, linear, copy=False)


def _name(evidence: Evidence | None) -> str | None:
    return None if evidence is None else evidence.label


def _check_any_left(chosen: dict[str, Solver], refused: dict[str, str]) -> None:
    if len(refused) == len(chosen):
        raise InvalidInput(" ".join(refused[name] for name in chosen))


def _told(observer: Observer, name: str) -> Callable[[Progress], None]:
    return lambda progress: observer(name, progress)
