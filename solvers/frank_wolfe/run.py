"""One solve: the relaxed masks of all rows, descended, bounded and rounded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clock import Clock
from ..pattern import CellPattern, removed_count
from ..problem import MaskProblem
from ..saliency import Wanda
from ..solution import Evidence, Status, TracePoint
from ..solver import Callback, Outcome, Progress
from ..swap.rows import ScaledRows
from .batch import Batch, Product
from .doubt import doubt_of
from .steps import rule_of

if TYPE_CHECKING:
    from .solver import FrankWolfe

_REFRESH = 50
"""Iterations between two fresh float64 computations of ``c``, which bound its drift."""


class Run:
    """One solve: the relaxed masks of all rows, and what was counted."""

    def __init__(
        self,
        options: FrankWolfe,
        problem: MaskProblem,
        start: Tensor | None,
        clock: Clock,
        callback: Callback | None,
    ) -> None:
        self._options, self._problem, self._start = options, problem, start
        self._clock, self._callback = clock, callback
        self._step = options.step
        if self._step == "auto":
            cells = isinstance(problem.pattern, CellPattern)
            self._step = "sliding" if cells else "pairwise"
        rows = ScaledRows.of(problem)
        score = Wanda().score(problem).double()
        lower = _fixed(problem, score, options.fixed)
        if start is None:
            first = problem.pattern.lmo(-score, lower)
        else:
            first = start if lower is None else problem.pattern.lmo(-start.double(), lower)
        product = Product(rows.gram, options.dtype)
        self._batch = Batch(problem.pattern, rows, first.double(), lower, product)
        if self._batch.joint:
            self._batch.rows = rows = _one_scale(rows)
            self._batch.refresh()
        self._all_rows, self._lower = rows, lower
        self._z = self._batch.z.clone()
        self._moving = torch.arange(len(self._z), device=problem.device)
        self._iterations = torch.zeros_like(self._moving)
        self._value = self._batch.value() * rows.unit
        self._gap = torch.full_like(self._value, torch.inf)
        self._history: list[tuple[int, float]] = []
        floor = 1e-8 * options.tolerance + 8 * torch.finfo(torch.float64).eps
        size = rows.weight**2 @ rows.gram.diagonal() + rows.linear.abs().sum(dim=1)
        self._floor = floor * size

    @property
    def z(self) -> Tensor:
        """The relaxed masks so far, float64 ``[rows, d]``."""
        return self._z

    def relaxed(self) -> Tensor:
        """Descend; the relaxed mask."""
        self._descend()
        return self._z

    def outcome(self) -> Outcome:
        """Descend, evaluate anew, round."""
        self._descend()
        problem, rows, batch = self._problem, self._all_rows, self._batch
        last = Batch(problem.pattern, rows, self._z, self._lower)
        gradient = last.gradient(last.correlation)
        vertex = last.lmo(gradient)
        value, gap = last.value(), (gradient * (self._z - vertex.double())).sum(dim=1)
        mask = problem.pattern.round(self._z) if self._lower is None else last.lmo(-self._z)
        objective = self._kept_objective(mask)
        bound = evidence = None
        if self._lower is None:
            bound = (
                value - gap - doubt_of(last, gradient, vertex, problem.negative_part())
            ) * rows.unit
            bound = bound.sum().reshape(1) if problem.pattern.coupled else bound
            cells = isinstance(problem.pattern, CellPattern)
            evidence = Evidence.GUARDED if cells else Evidence.CLAIMED
        stats: dict[str, Any] = {
            "step": self._step,
            "iterations": int(self._iterations.max()),
            "mean_iterations": float(self._iterations.double().mean()),
            "lmo_calls": batch.lmo_calls + last.lmo_calls,
            "converged": len(self._z) - len(self._moving),
            "relaxed": (value * rows.unit).tolist(),
            "fw_gap": (gap * rows.unit).tolist(),
            "rounding_residual": float((self._z - mask.double()).abs().mean()),
            "history": self._history,
        }
        trace = self._trace(objective, bound)
        return Outcome(mask, self._status(), bound, evidence, stats, trace)

    def _descend(self) -> None:
        options, batch = self._options, self._batch
        rule = rule_of(self._step, batch)
        for iteration in range(options.iterations + 1):
            if iteration % _REFRESH == 0 and iteration:
                batch.refresh()
                self._report()
            gradient = batch.gradient(batch.correlation)
            vertex = batch.lmo(gradient).double()
            finished = self._finished(batch, gradient, vertex)
            self._note(iteration)
            if bool(finished.any()):
                moving = (~finished).nonzero().flatten()
                self._leave(finished)
                if len(moving) == 0:
                    break
                batch.take(moving)
                rule.take(moving)
                gradient, vertex = gradient[moving], vertex[moving]
            if iteration == options.iterations or self._clock.expired:
                break
            rule.advance(batch, gradient, vertex, iteration)
            self._iterations[self._moving] += 1
        self._z[self._moving] = batch.z[: len(self._moving)]
        self._report()

    def _finished(self, batch: Batch, gradient: Tensor, vertex: Tensor) -> Tensor:
        """Rows whose gap is small enough, also when computed anew in float64; bool ``[rows]``."""
        value, gap = batch.value(), (gradient * (batch.z - vertex)).sum(dim=1)
        unit = batch.rows.unit
        self._value[self._moving], self._gap[self._moving] = value * unit, gap * unit
        finished = self._small(batch, value, gap, self._moving)
        if not bool(finished.any()):
            return finished
        index = finished.nonzero().flatten()
        lower = None if batch.lower is None else batch.lower[index]
        rows = batch.rows.take(index)
        fresh = Batch(batch.pattern, rows, batch.z[index], lower)
        gradient = fresh.gradient(fresh.correlation)
        gap = (gradient * (fresh.z - fresh.lmo(gradient).double())).sum(dim=1)
        batch.lmo_calls += fresh.lmo_calls
        batch.correlation[index] = fresh.correlation
        sure = self._small(fresh, fresh.value(), gap, self._moving[index])
        return finished.index_put((index,), sure)

    def _small(self, batch: Batch, value: Tensor, gap: Tensor, index: Tensor) -> Tensor:
        limit = self._options.tolerance * batch.total(value).abs()
        return batch.total(gap) <= limit + batch.total(self._floor[index])

    def _leave(self, finished: Tensor) -> None:
        self._z[self._moving[finished]] = self._batch.z[finished]
        self._moving = self._moving[~finished]

    def _note(self, iteration: int) -> None:
        """Record the gap, at every tenth part more iterations."""
        if not self._history or iteration >= 1.1 * self._history[-1][0]:
            gap, value = float(self._gap.sum()), float(self._value.sum())
            self._history.append((iteration, gap / abs(value) if value else 0.0))

    def _status(self) -> Status:
        if len(self._moving) == 0:
            return Status.FEASIBLE
        return Status.TIME_LIMIT if self._clock.expired else Status.ITERATION_LIMIT

    def _report(self) -> None:
        if self._callback is not None:
            done = len(self._z) - len(self._moving)
            self._callback(Progress(done, len(self._z), self._clock.seconds))

    def _kept_objective(self, mask: Tensor) -> Tensor:
        """Loss of each row once the start has been taken back where it was better."""
        objective = self._problem.objective(mask)
        if self._start is None:
            return objective
        before = self._problem.objective(self._start)
        if not self._problem.pattern.coupled:
            return torch.minimum(objective, before)
        return before if float(before.sum()) < float(objective.sum()) else objective

    def _trace(self, objective: Tensor, bound: Tensor | None) -> list[TracePoint]:
        total = None if bound is None else float(bound.sum())
        points = [TracePoint(self._clock.seconds, float(objective.sum()), total)]
        if self._start is not None:
            before = float(self._problem.objective(self._start).sum())
            points.insert(0, TracePoint(0.0, max(before, points[0].objective)))
        return points


def _fixed(problem: MaskProblem, score: Tensor, share: float) -> Tensor | None:
    """The best-scored ``removed_count(kept, share)`` entries of each cell, bool; None for none."""
    pattern = problem.pattern
    if share == 0:
        return None
    assert isinstance(pattern, CellPattern)
    count = removed_count(pattern.kept_per_cell(problem.shape), share)
    cells = pattern.cells(score)
    mask = torch.zeros(cells.shape, dtype=torch.bool, device=cells.device)
    return mask.scatter_(1, cells.topk(count, dim=1).indices, True).reshape(problem.shape)


def _one_scale(rows: ScaledRows) -> ScaledRows:
    """The same rows with the unit of the largest, so that their losses add up."""
    unit = rows.unit.amax()
    share = rows.unit / unit
    return replace(
        rows,
        weight=rows.weight * share.sqrt()[:, None],
        linear=rows.linear * share[:, None],
        unit=unit.expand_as(rows.unit),
        noise=rows.noise * share,
    )
