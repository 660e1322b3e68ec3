"""The semidefinite bound as a solver."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..certificate import Certificate
from ..clock import Clock
from ..options import option
from ..pattern import CellPattern
from ..problem import MaskProblem
from ..registry import register
from ..solution import MaskSolution, Status, TracePoint, shared_out
from ..solver import Callback, Outcome, Progress, Search, Solver
from ..swap import Swap
from .ascent import Bounded, Effort, ascend, strengthen
from .cuts import Array
from .layer import bound_row, fitted_price, shares, threads
from .program import BinaryProgram, independent_parts
from .wide import strengthen_batch
from .witness import Witness, certificate

_DECOMPOSED_FROM = 400
"""Weights from which a layer with one budget falls into rows by default."""

_PILOT = 8
"""Rows that the price is fitted to."""

_LEAST_GAIN = 0.02

_DEEPEN_SECONDS = 15.0
"""Least time per row, at 1000 inputs, in which a few rounds by eigenvalues can be made."""


@register
@dataclass(frozen=True)
class Semidefinite(Solver):
    """Bounds from the semidefinite relaxation with cuts; masks by rounding it, then swaps.

    Row by row. Where rows share a budget, a small layer is taken at once, and a larger one falls
    into rows by a price of pruned weights (`solvers.semidefinite.layer`); only the sum of the
    rows' bounds is one then. Each bound is proven by a `Witness`, apart from any tolerance;
    `solvers.certificate` keeps them.

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
    layer was decomposed. A row without a start begins at Wanda + swaps.
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

    def _search(self, search: Search) -> Outcome:
        problem, start, clock = search.problem, search.start, search.clock
        assert start is not None
        large = problem.weight.numel() >= _DECOMPOSED_FROM
        if problem.pattern.coupled and (large if self.decompose is None else self.decompose):
            return self._search_decomposed(problem, start, clock, search.callback)
        best = Swap().solve(problem, start=start)
        mask, objective = best.mask.clone(), best.objective.clone()
        rows = _RowResults(problem, mask, objective, clock, search.callback)
        if problem.shape[1] >= self.wide_from and not problem.pattern.coupled:
            self._bound_batches(rows, search.seed)
        else:
            self._bound_parts(rows)
        gap = rows.objective - rows.bound
        closed = bool((gap <= self.rel_gap * rows.objective.abs() + 1e-300).all())
        status = Status.OPTIMAL if closed else Status.FEASIBLE
        end = TracePoint(clock.seconds, float(rows.objective.sum()), float(rows.bound.sum()))
        return Outcome(
            mask=rows.mask,
            status=Status.TIME_LIMIT if clock.expired and not closed else status,
            bound=rows.bound,
            stats={
                "rounds": sum(one.rounds for one in rows.found),
                "evaluations": sum(one.evaluations for one in rows.found),
                "cuts": sum(len(one.witness.multipliers.cuts) for one in rows.found),
            },
            trace=[*rows.trace[:-1], end],
            certificates=rows.certificates,
        )

    def _bound_parts(self, rows: _RowResults) -> None:
        """Rows (or a small layer) by eigenvalues, several at a time."""
        problem, clock = rows.problem, rows.clock
        parts, workers = independent_parts(problem), threads(problem)

        def bounded(at: int) -> tuple[BinaryProgram, Incumbent, Bounded]:
            incumbent = rows.incumbent(parts[at])
            program = BinaryProgram.of(incumbent.problem)
            turns = -(-(len(parts) - at) // workers)
            result = strengthen(
                program,
                incumbent.total,
                Effort(
                    max_rounds=self.rounds,
                    seconds=min(self.row_seconds, clock.remaining / turns),
                    least_gain=_LEAST_GAIN,
                    triangles_above=self.triangles_above,
                ),
                rel_gap=self.rel_gap,
                improved=incumbent.improve,
            )
            return program, incumbent, result

        with ThreadPoolExecutor(workers) as pool:
            for part, answer in zip(parts, pool.map(bounded, range(len(parts))), strict=True):
                rows.finish(part, *answer)

    def _bound_batches(self, rows: _RowResults, seed: int) -> None:
        """Wide rows, side by side; each may then be deepened alone."""
        count, clock = len(rows.mask), rows.clock
        for at in range(0, count, self.batch):
            part = list(range(at, min(at + self.batch, count)))
            incumbent = rows.incumbent(part)
            share = clock.remaining * len(part) / (count - at)
            seconds = min(self.row_seconds * len(part), share)
            until = clock.seconds + seconds
            batch = strengthen_batch(
                incumbent.problem,
                ~incumbent.mask,
                incumbent.objective,
                rel_gap=self.rel_gap,
                max_rounds=self.rounds,
                seconds=seconds,
                least_gain=_LEAST_GAIN,
                seed=seed,
            )
            rounded = rows.problem.pattern.round(1 - batch.relaxed)
            rows.improve(part, Swap().solve(incumbent.problem, start=rounded))
            for place, row in enumerate(part):
                incumbent = rows.incumbent([row])
                program = BinaryProgram.of(incumbent.problem)
                share = (until - clock.seconds) / (len(part) - place)
                deeper = self._deepened(program, incumbent, batch.bounded[place], share)
                rows.finish([row], program, incumbent, deeper)

    def _search_decomposed(
        self, problem: MaskProblem, start: Tensor, clock: Clock, callback: Callback | None
    ) -> Outcome:
        """Bound a layer with one budget by its rows at a price."""
        rows = len(start)
        best = Swap().solve(problem, start=start)
        incumbent = Incumbent(problem, best.mask, best.objective)
        trace = [TracePoint(clock.seconds, incumbent.total)]
        workers = threads(problem)
        price = self.price
        if price is None:
            pilot = sorted({at * rows // _PILOT for at in range(_PILOT)})
            seconds = min(len(pilot) * self.row_seconds / 2, max(0.2 * clock.remaining, 1e-3))
            price = fitted_price(problem, best.mask, pilot, seconds)
        mean = incumbent.total / rows

        def bounded(row: int) -> tuple[BinaryProgram, Bounded]:
            turns = -(-(rows - row) // workers)
            effort = Effort(
                max_rounds=self.rounds,
                seconds=min(self.row_seconds, clock.remaining / turns),
                least_gain=_LEAST_GAIN,
                triangles_above=self.triangles_above,
            )
            return bound_row(problem, best.mask, row, price, mean, self.rel_gap, effort)

        found: list[tuple[BinaryProgram, Bounded]] = []
        with ThreadPoolExecutor(workers) as pool:
            for answer in pool.map(bounded, range(rows)):
                found.append(answer)
                if callback is not None:
                    callback(Progress(len(found), rows, clock.seconds))
        incumbent.improve(np.concatenate([one.relaxed for _, one in found]))
        mask, objective = incumbent.mask, incumbent.objective
        bound = shares(problem, mask, price, [one.bound for _, one in found])
        total, gap = incumbent.total, incumbent.total - float(bound.sum())
        trace.append(TracePoint(clock.seconds, total, float(bound.sum())))
        closed = gap <= self.rel_gap * abs(total) + 1e-300
        status = Status.OPTIMAL if closed else Status.FEASIBLE
        kept = mask.cpu().numpy()
        return Outcome(
            mask=mask,
            status=Status.TIME_LIMIT if clock.expired and not closed else status,
            bound=torch.minimum(bound, objective),
            stats={
                "rounds": sum(one.rounds for _, one in found),
                "evaluations": sum(one.evaluations for _, one in found),
                "cuts": sum(len(one.witness.multipliers.cuts) for _, one in found),
                "price": price,
            },
            trace=trace,
            certificates=[
                certificate(row, kept[row], program, one.witness, price)
                for row, (program, one) in enumerate(found)
            ],
        )

    def _deepened(
        self,
        program: BinaryProgram,
        incumbent: Incumbent,
        found: Bounded,
        seconds: float,
    ) -> Bounded:
        """A row's bound after more work by eigenvalues, with triangles, where time is left for it.

        The low-rank search ends at the pairwise cuts, a little relaxed.
        """
        gap = incumbent.total - found.bound
        enough = seconds > _DEEPEN_SECONDS * (program.inputs / 1000) ** 2
        if program.size == 0 or not enough or gap <= self.triangles_above * abs(incumbent.total):
            return found
        size = program.size
        deeper = ascend(
            program.scaled(1 / size),
            incumbent.total / size,
            Effort(
                max_rounds=self.rounds,
                seconds=seconds,
                least_gain=_LEAST_GAIN,
                triangles_above=self.triangles_above,
            ),
            rel_gap=self.rel_gap,
            start=found.last,
            improved=lambda x: incumbent.improve(x) / size,
        )
        witness = Witness.of(program, deeper.witness.multipliers.scaled(size))
        deeper = replace(deeper, bound=witness.bound(program), witness=witness)
        return deeper if deeper.bound > found.bound else found


class _RowResults:
    """What a search knows of its rows so far.

    Attributes
    ----------
    mask, objective, bound
        Bool ``[rows, d]``, float64 ``[rows]``, float64 ``[rows]``.
    found, certificates, trace
        In the order in which rows were finished.
    """

    def __init__(
        self,
        problem: MaskProblem,
        mask: Tensor,
        objective: Tensor,
        clock: Clock,
        callback: Callback | None,
    ) -> None:
        self.problem, self.mask, self.objective = problem, mask, objective
        self.clock, self._callback = clock, callback
        self.bound = torch.zeros_like(objective)
        self.found: list[Bounded] = []
        self.certificates: list[Certificate] = []
        self.trace = [TracePoint(clock.seconds, float(objective.sum()))]

    def incumbent(self, rows: list[int]) -> Incumbent:
        """The best masks of some rows."""
        return Incumbent(self.problem.rows(rows), self.mask[rows], self.objective[rows])

    def improve(self, rows: list[int], solution: MaskSolution) -> None:
        """Take over the rows' masks that are better."""
        better = solution.objective < self.objective[rows]
        self.mask[rows] = solution.mask.where(better[:, None], self.mask[rows])
        self.objective[rows] = torch.minimum(solution.objective, self.objective[rows])

    def finish(
        self, rows: list[int], program: BinaryProgram, incumbent: Incumbent, result: Bounded
    ) -> None:
        """Rows that were bounded together are done."""
        self.mask[rows], self.objective[rows] = incumbent.mask, incumbent.objective
        self.bound[rows] = incumbent.spread(result.bound)
        self.found.append(result)
        if not self.problem.pattern.coupled:
            kept = incumbent.mask[0].cpu().numpy()
            self.certificates.append(certificate(rows[0], kept, program, result.witness))
        self.trace.append(TracePoint(self.clock.seconds, float(self.objective.sum())))
        if self._callback is not None:
            self._callback(Progress(rows[-1] + 1, len(self.mask), self.clock.seconds))


class Incumbent:
    """Best mask of some rows, improved by rounding relaxed points and swapping from there.

    Attributes
    ----------
    problem
        The rows.
    mask, objective
        Of the best mask so far: bool ``[rows, d]``, float64 ``[rows]``.
    """

    def __init__(self, problem: MaskProblem, mask: Tensor, objective: Tensor) -> None:
        self.problem, self.mask, self.objective = problem, mask, objective
        self._tried: set[bytes] = set()

    @property
    def total(self) -> float:
        """Summed objective."""
        return float(self.objective.sum())

    def improve(self, relaxed: Array) -> float:
        """Round a relaxed ``x`` (1 = pruned, flat), swap, and return the best total so far."""
        kept = torch.from_numpy(1.0 - relaxed).view(self.problem.shape).to(self.problem.device)
        start = self.problem.pattern.round(kept)
        key = np.packbits(start.cpu().numpy()).tobytes()
        if key not in self._tried:
            self._tried.add(key)
            solution = Swap(dtype="float64").solve(self.problem, start=start)
            if float(solution.objective.sum()) < self.total:
                self.mask, self.objective = solution.mask, solution.objective
        return self.total

    def spread(self, bound: float) -> Tensor:
        """A bound of the total as bounds of the rows, none above its objective."""
        return shared_out(bound, self.objective)
