"""The semidefinite bound as a solver."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import Clock
from ..options import option
from ..pattern import CellPattern
from ..problem import MaskProblem
from ..registry import register
from ..solution import Evidence, Status
from ..solver import Outcome, Search, Solver
from ..standing import Incumbent, Standing, least_seconds
from ..swap import Swap
from .ascent import Bounded, Effort, ascend, strengthen
from .cuts import Array
from .dual import Iterate, Multipliers
from .layer import bound_row, fitted_price, layer_bound, threads
from .program import BinaryProgram
from .wide import strengthen_batch
from .witness import Witness, certificate

_DECOMPOSED_FROM = 400
"""Weights from which a layer with one budget falls into rows by default."""

_PILOT = 8
"""Rows that the price is fitted to."""

_LEAST_GAIN = 0.02

_DEEPEN_SECONDS = 15.0
"""Least time per row, at 1000 inputs, in which a few rounds by eigenvalues can be made."""

_STRICTER = 0.99
"""Share of the gap asked for at which a row is finished: its certificate claims a little less."""

_LARGEST_PROGRAM = 4000
"""Weights of a layer that is one dense program, at most (128 MiB a matrix)."""


@register
@dataclass(frozen=True)
class Semidefinite(Solver):
    """Bounds from the semidefinite relaxation with cuts; masks by rounding it, then swaps.

    Row by row. Where rows share a budget, a small layer is taken at once, and a larger one falls
    into rows by a price of pruned weights (`solvers.semidefinite.layer`). Each bound is proven by
    a `Witness`, apart from any tolerance; `solvers.certificate` keeps them. Rows that the time
    does not reach have the bound of the plain relaxation, without a witness.

    Parameters
    ----------
    rel_gap
        A row is finished when its bound is within this share of its objective.
    rounds
        Most rounds of dual ascent per row.
    row_seconds
        Most seconds per row.
    triangles_above
        Relative gap above which triangle inequalities are added when the pairwise ones stall.
    decompose
        Whether a layer with one budget falls into rows; None: from 400 weights on. Only then
        are there certificates for it.
    price
        What a pruned weight is worth in the decomposition; None to look for the best.
    wide_from
        Rows of at least so many inputs are bounded in batches by the low-rank method of `wide`.
    batch
        Rows that it solves side by side; they share their ``row_seconds``.

    Notes
    -----
    ``stats``: ``rounds``, ``evaluations`` and ``cuts`` (summed over rows), and ``price`` if the
    layer was decomposed (None if the time did not reach it).
    """

    rel_gap: float = option(1e-4, least=0)
    rounds: int = option(200, least=1)
    row_seconds: float = option(60.0, above=0, infinite=True)
    triangles_above: float = option(0.01, least=0, infinite=True)
    decompose: bool | None = None
    price: float | None = None
    wide_from: int = option(192, least=1)
    batch: int = option(8, least=1)

    name = "semidefinite"
    summary = "certified bounds by semidefinite duality with cuts; masks by rounding and swaps"
    patterns = (CellPattern,)
    gives_bound = True
    needs_start = True

    def prepare(self, device: torch.device) -> None:
        import scipy.optimize  # noqa: F401
        import threadpoolctl  # noqa: F401

        Swap().prepare(device)

    def refuse(self, problem: MaskProblem) -> str | None:
        if not problem.pattern.coupled or self._decomposes(problem):
            return None
        return too_large(self.name, problem, "decompose=True takes it row by row")

    def _decomposes(self, problem: MaskProblem) -> bool:
        """Whether a layer with one budget falls into rows."""
        large = problem.weight.numel() >= _DECOMPOSED_FROM
        return large if self.decompose is None else self.decompose

    def _search(self, search: Search) -> Outcome:
        standing = Standing(search)
        problem = search.problem
        found: list[Bounded] = []
        stats: dict[str, Any] = {}
        if problem.pattern.coupled and self._decomposes(problem):
            found, stats["price"] = self._bound_layer(standing)
        elif problem.shape[1] >= self.wide_from and not problem.pattern.coupled:
            found = self._bound_batches(standing, search.seed)
        else:
            found = self._bound_parts(standing)
        stats |= {
            "rounds": sum(one.rounds for one in found),
            "evaluations": sum(one.evaluations for one in found),
            "cuts": sum(len(one.witness.multipliers.cuts) for one in found),
        }
        return standing.outcome(Status.FEASIBLE, stats)

    def _effort(self, clock: Clock) -> Effort:
        return Effort(
            max_rounds=self.rounds,
            clock=clock,
            least_gain=_LEAST_GAIN,
            triangles_above=self.triangles_above,
        )

    def _prove_closed(self, standing: Standing) -> list[Bounded]:
        """Witnesses of rows that the relaxation has closed already."""
        closed = standing.closed(self.rel_gap).nonzero().flatten().tolist()
        return [_prove_relaxation(standing, row) for row in closed]

    def _bound_parts(self, standing: Standing) -> list[Bounded]:
        """Rows (or a small layer) by eigenvalues, several at a time."""
        problem, clock, units = standing.problem, standing.clock, standing.units
        workers = threads(problem)
        closed = standing.closed(self.rel_gap).tolist()
        found = [] if standing.coupled else self._prove_closed(standing)

        def bounded(unit: int) -> tuple[BinaryProgram, Incumbent, Bounded] | None:
            if clock.expired or closed[unit]:
                return None
            rows = units[unit]
            least = least_seconds(len(rows) * problem.shape[1])
            part = clock.part(1 / -(-(len(units) - unit) // workers), self.row_seconds, least)
            incumbent = Incumbent(problem.rows(rows), standing.mask[rows], part)
            program = BinaryProgram.of(incumbent.problem)
            result = strengthen(
                program,
                incumbent.total,
                self._effort(part),
                rel_gap=_STRICTER * self.rel_gap,
                relaxed=standing.relaxed[rows].flatten().cpu().numpy(),
                improved=incumbent.improve,
            )
            return program, incumbent, result

        with ThreadPoolExecutor(workers) as pool:
            for unit, answer in enumerate(pool.map(bounded, range(len(units)))):
                if answer is not None:
                    program, incumbent, result = answer
                    _finish(standing, unit, program, incumbent.mask, result)
                    found.append(result)
        return found

    def _bound_batches(self, standing: Standing, seed: int) -> list[Bounded]:
        """Wide rows, side by side; each may then be deepened alone."""
        clock, found = standing.clock, self._prove_closed(standing)
        wanted = (~standing.closed(self.rel_gap)).nonzero().flatten().tolist()
        for at in range(0, len(wanted), self.batch):
            rows = wanted[at : at + self.batch]
            if clock.expired:
                break
            share = clock.part(len(rows) / (len(wanted) - at), self.row_seconds * len(rows))
            problem = standing.problem.rows(rows)
            batch = strengthen_batch(
                problem,
                ~standing.mask[rows],
                standing.objective[rows],
                self._effort(share),
                clock,
                rel_gap=self.rel_gap,
                seed=seed,
            )
            if not clock.expired:
                rounded = problem.pattern.round(1 - batch.relaxed)
                swapped = Swap().solve(problem, start=rounded, time_limit=clock.limit)
                standing.offer(rows, swapped.mask)
            for place, (row, result) in enumerate(zip(rows, batch.bounded, strict=True)):
                if result is None:
                    continue
                turn = share.part(1 / (len(rows) - place))
                incumbent = Incumbent(problem.rows([place]), standing.mask[[row]], turn)
                program = BinaryProgram.of(incumbent.problem)
                x = standing.relaxed[row].cpu().numpy()
                deeper = self._deepened(program, incumbent, result, x, turn)
                _finish(standing, row, program, incumbent.mask, deeper)
                found.append(deeper)
        return found

    def _deepened(
        self,
        program: BinaryProgram,
        incumbent: Incumbent,
        found: Bounded,
        relaxed: Array,
        clock: Clock,
    ) -> Bounded:
        """A row's bound after more work by eigenvalues, with triangles, where time is left for it.

        The low-rank search ends at the pairwise cuts, a little relaxed. In too little time it
        may end below the plain relaxation, whose witness then stands.
        """
        gap = incumbent.total - found.bound
        if program.size == 0 or gap <= self.triangles_above * abs(incumbent.total):
            return found
        plain = Witness.near(program, Multipliers.of_relaxation(program, relaxed))
        if (bound := plain.bound(program)) > found.bound:
            found = replace(found, bound=bound, witness=plain)
        if clock.remaining <= _DEEPEN_SECONDS * (program.inputs / 1000) ** 2:
            return found
        size = program.size
        deeper = ascend(
            program.scaled(1 / size),
            incumbent.total / size,
            self._effort(clock),
            rel_gap=_STRICTER * self.rel_gap,
            start=found.last,
            improved=lambda x: incumbent.improve(x) / size,
        )
        witness = Witness.of(program, deeper.witness.multipliers.scaled(size))
        deeper = replace(deeper, bound=witness.bound(program), witness=witness)
        return deeper if deeper.bound > found.bound else found

    def _bound_layer(self, standing: Standing) -> tuple[list[Bounded], float | None]:
        """Bound a layer with one budget by its rows at a price."""
        problem, clock, rows = standing.problem, standing.clock, len(standing.mask)
        mask, workers, price = standing.mask.clone(), threads(problem), self.price
        if price is None and not clock.expired:
            pilot = sorted({at * rows // _PILOT for at in range(_PILOT)})
            price = fitted_price(
                problem, mask, pilot, clock.part(0.2, len(pilot) * self.row_seconds / 2)
            )
        mean = standing.total / rows

        def bounded(row: int) -> tuple[BinaryProgram, Bounded] | None:
            if clock.expired or price is None:
                return None
            part = clock.part(1 / -(-(rows - row) // workers), self.row_seconds)
            x, rel_gap = standing.relaxed[row].cpu().numpy(), _STRICTER * self.rel_gap
            return bound_row(problem, mask, row, price, mean, rel_gap, self._effort(part), x)

        found = []
        with ThreadPoolExecutor(workers) as pool:
            for answer in pool.map(bounded, range(rows)):
                if answer is not None:
                    found.append(answer)
                    standing.note(len(found))
        if price is None or len(found) < rows:  # without one of the rows nothing is proven
            return [], price
        if not clock.expired:
            incumbent = Incumbent(problem, standing.mask, clock)
            incumbent.improve(np.concatenate([one.relaxed for _, one in found]))
            standing.offer(slice(None), incumbent.mask)
        kept = standing.mask.cpu().numpy()
        certificates = [
            certificate(row, kept[row], program, one.witness, price)
            for row, (program, one) in enumerate(found)
        ]
        bound = layer_bound(int((~mask).sum()), price, [one.bound for one in certificates])
        standing.raise_bound(0, bound, Evidence.CERTIFIED, certificates)
        return [one for _, one in found], price


def too_large(solver: str, problem: MaskProblem, instead: str) -> str | None:
    """Why a layer cannot be one dense program, in a sentence; None if it can."""
    weights = problem.weight.numel()
    if weights <= _LARGEST_PROGRAM:
        return None
    size = 8 * weights**2 / 2**30
    return (
        f"Solver '{solver}' takes rows that share a budget as one program of {weights} weights, "
        f"whose matrix alone would need {size:.1f} GiB; {instead}."
    )


def _prove_relaxation(standing: Standing, row: int) -> Bounded:
    """The witness of the plain relaxation, for a row that needs no more."""
    program = BinaryProgram.of(standing.problem.rows([row]))
    x = standing.relaxed[row].cpu().numpy()
    witness = Witness.near(program, Multipliers.of_relaxation(program, x))
    at = Iterate.zero(program.inputs)
    result = Bounded(witness.bound(program), witness, at, x, rounds=0, evaluations=0)
    _finish(standing, row, program, standing.mask[[row]], result)
    return result


def _finish(
    standing: Standing,
    unit: int,
    program: BinaryProgram,
    mask: Tensor,
    result: Bounded,
) -> None:
    """A unit is done: take over its mask, its bound and, for a row of its own, its certificate."""
    rows = standing.units[unit]
    standing.offer(rows, mask)
    if standing.coupled:
        standing.raise_bound(unit, result.bound, Evidence.GUARDED)
    else:
        kept = standing.mask[unit].cpu().numpy()
        proof = certificate(unit, kept, program, result.witness)
        standing.raise_bound(unit, proof.bound, Evidence.CERTIFIED, [proof])
    standing.note(rows[-1] + 1)
