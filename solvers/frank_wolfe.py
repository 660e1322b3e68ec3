"""Frank-Wolfe over the convex hull of a pattern's masks, then rounding (SparseFW).

A relaxed mask ``z`` in ``[0, 1]`` loses, with ``q = (1 - z) * w`` and ``c = G q``,

    f(z) = q^T G q + linear^T (1 - z),    grad f(z) = -(2 w c + linear)

which is convex, so that for every allowed mask ``m``

    f(m) >= f(z) - max_s <grad f(z), z - s> = f(z) - gap(z):

the Frank-Wolfe gap, found by one call of the pattern's oracle, is a bound as well as the
criterion to stop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .errors import InvalidInput
from .pattern import CellPattern, Pattern
from .problem import MaskProblem
from .registry import register
from .saliency import Wanda
from .solution import Status, TracePoint, shared_out
from .solver import Callback, Clock, Outcome, Progress, Search, Solver
from .swap.rows import ScaledRows

_STEPS = ("auto", "open_loop", "line_search", "pairwise", "sliding")

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tfloat32": torch.float32,
    "bfloat16": torch.bfloat16,
}

_REFRESH = 50
"""Iterations between two fresh float64 computations of ``c``, which bound its drift."""

_SNAP = 1e-12
"""Entries of ``z`` this close to 0 or 1 are set there."""

_NEWTON_STEPS = 100
"""Most steps to a cell's multiplier; few are used, since each either is exact or halves."""

_ORACLE_ERROR = 1e-9
"""How much of the largest cost an oracle that is not a selection may be off by."""


@register
@dataclass(frozen=True)
class FrankWolfe(Solver):
    """Frank-Wolfe on the relaxation, then the nearest mask (SparseFW, arXiv 2510.13713).

    Parameters
    ----------
    step
        How an iteration moves; see the notes. "auto" is "sliding" where cells have a fixed
        count, and "pairwise" for other patterns.
    iterations
        Most iterations.
    tolerance
        A row stops when its gap is at most this share of its relaxed loss. Rows that share a
        budget stop together, on their sums.
    fixed
        Share of each cell's kept weights that Wanda chooses beforehand (the paper's alpha), as
        ``floor(kept * fixed)`` weights; the rest is optimised. 0 is the default, since only then
        is the whole problem relaxed and bounded. More raises the relaxed loss but leaves less to
        round: measured at 60 % per row, 0.5 gives the best masks (benchmarks/frank_wolfe.py).
        The paper's default is 0.9, chosen for perplexity.
    dtype
        Of the matrix products: "float64", "float32", "tfloat32" (10 bits of mantissa; tensor
        cores on CUDA, the same rounding elsewhere) or "bfloat16" (7 bits). Everything else is
        float64, as is the bound, and a row only stops on a gap evaluated in float64; so this
        changes the path and its length, measured in benchmarks/frank_wolfe_time.py.

    Notes
    -----
    Step rules, each with one matrix product an iteration:

    - "open_loop": towards the oracle's vertex by ``2 / (t + 2)``, as in SparseFW.
    - "line_search": the same way, to the exact minimum.
    - "pairwise": from an away vertex to the oracle's vertex, to the exact minimum. With cells the
      away vertex is the worst one of the smallest face that holds ``z``, so that no vertices
      need be stored (Garber & Meshi, NeurIPS 2016), and a step that the face cut short is
      followed by one of "line_search"; other hulls are not described by their bounds, so that
      there it is the worst of the vertices that make up ``z``.
    - "sliding": conditional gradient sliding (Lan & Zhou, SIAM J. Optim. 2016), an accelerated
      gradient step whose quadratic model is minimised over the hull. Here the model has the
      diagonal metric ``w_j^2 G_jj``, whose minimiser over a cell is ``clip(y - (g - t) / h)`` for
      the one ``t`` that meets the count. The metric's factor follows the curvature seen, and
      momentum restarts when it points uphill (O'Donoghue & Candes, 2015). Cells only.

    Where rows share a budget, all of them make one step together.

    The bound of a row is ``f(z) - gap(z)`` from a fresh float64 evaluation at the last ``z``, less
    what rounding and an indefinite Gram matrix could add. With a shared budget only the *sum* of
    the bounds holds, and it is spread over the rows in proportion to their losses. With
    ``fixed`` there is none: the restricted problem's bound says nothing about the problem's.

    ``stats``: ``iterations`` (of the slowest row), ``mean_iterations`` (over rows), ``lmo_calls``
    (batched), ``converged`` (rows), ``relaxed`` and ``fw_gap`` (of each row, at the last ``z``),
    ``rounding_residual`` (mean ``|z - mask|``), ``history`` (pairs of an iteration and the
    summed gap relative to the summed loss), ``step``. The trace holds the start, if one was
    given, and the answer, with the bound: a relaxed loss belongs to no mask.
    """

    step: Literal["auto", "open_loop", "line_search", "pairwise", "sliding"] = "auto"
    iterations: int = 2000
    tolerance: float = 1e-4
    fixed: float = 0.0
    dtype: Literal["float64", "float32", "tfloat32", "bfloat16"] = "float64"

    name = "frank_wolfe"
    summary = "Frank-Wolfe on the relaxation, then rounding; with a bound"
    patterns = (Pattern,)
    gives_bound = True
    rowwise = True

    def __post_init__(self) -> None:
        if self.step not in _STEPS:
            raise InvalidInput(f"step '{self.step}' is none of {', '.join(_STEPS)}.")
        if self.iterations < 1:
            raise InvalidInput(f"iterations={self.iterations} runs nothing; give at least 1.")
        if not self.tolerance >= 0:
            raise InvalidInput(f"tolerance={self.tolerance} is negative; give 0 or more.")
        if not 0 <= self.fixed <= 1:
            raise InvalidInput(f"fixed={self.fixed} is outside [0, 1]; it is a share.")
        if self.dtype not in _DTYPES:
            raise InvalidInput(f"dtype '{self.dtype}' is none of {', '.join(_DTYPES)}.")

    def _search(self, search: Search) -> Outcome:
        problem, start, clock = search.problem, search.start, search.clock
        cells = isinstance(problem.pattern, CellPattern)
        if self.fixed and not cells:
            raise InvalidInput(
                f"fixed={self.fixed} needs a count per cell, which {problem.pattern} has not; "
                "use fixed=0."
            )
        if self.step == "sliding" and not cells:
            raise InvalidInput(
                f"step 'sliding' needs cells of a fixed count, which {problem.pattern} has not; "
                "use 'pairwise'."
            )
        return _Run(self, problem, start, clock, search.callback).outcome()


class _Product:
    """Products with the Gram matrix in the chosen precision.

    Parameters
    ----------
    gram
        Float64 ``[d, d]``.
    name
        One of `_DTYPES`.
    """

    def __init__(self, gram: Tensor, name: str) -> None:
        self._dtype, self._tfloat = _DTYPES[name], name == "tfloat32"
        self._gram = self._rounded(gram)

    def __call__(self, rows: Tensor) -> Tensor:
        """``rows @ gram``, float64 ``[rows, d]``."""
        if self._dtype != torch.float32:
            return (self._rounded(rows) @ self._gram).double()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self._tfloat else "highest")
        try:
            return (self._rounded(rows) @ self._gram).double()
        finally:
            torch.set_float32_matmul_precision(before)

    def _rounded(self, values: Tensor) -> Tensor:
        values = values.to(self._dtype)
        if not self._tfloat:
            return values
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def relaxed_mask(problem: MaskProblem, options: FrankWolfe, clock: Clock) -> Tensor:
    """The relaxed mask that Frank-Wolfe ends at, before rounding, float64 ``[rows, d]``."""
    return _Run(options, problem, None, clock, None).relaxed()


class _Batch:
    """Rows that still move: relaxed masks, correlations, and the oracle.

    Attributes
    ----------
    rows
        Weights and Gram matrix, scaled; with one common scale where rows move jointly.
    z, correlation
        Float64 ``[rows, d]``: relaxed mask and ``c = G q``.
    lower
        Bool ``[rows, d]``, entries fixed as kept, or None.
    joint
        Whether all rows make one step together.
    lmo_calls
        Calls of the pattern's oracle.
    """

    def __init__(
        self,
        pattern: Pattern,
        rows: ScaledRows,
        z: Tensor,
        lower: Tensor | None,
        product: _Product | None = None,
    ) -> None:
        self.pattern, self.rows, self.z, self.lower = pattern, rows, z, lower
        self.joint = pattern.coupled or not isinstance(pattern, CellPattern)
        self.lmo_calls = 0
        self._product = product or _Product(rows.gram, "float64")
        self.refresh()

    def refresh(self) -> None:
        """Compute ``c`` anew in float64."""
        self.correlation = (self.rows.weight * (1 - self.z)) @ self.rows.gram

    def product(self, move: Tensor) -> Tensor:
        """``G (w * move)`` in the chosen precision, ``[rows, d]``."""
        return self._product(self.rows.weight * move)

    def value(self) -> Tensor:
        """Relaxed loss, ``[rows]``."""
        cost = self.rows.weight * self.correlation + self.rows.linear
        return ((1 - self.z) * cost).sum(dim=1)

    def gradient(self, correlation: Tensor) -> Tensor:
        """Gradient in ``z`` where ``c`` is ``correlation``, ``[rows, d]``."""
        return -(2 * self.rows.weight * correlation + self.rows.linear)

    def lmo(self, direction: Tensor) -> Tensor:
        """The pattern's oracle with the fixed entries, bool ``[rows, d]``."""
        self.lmo_calls += 1
        return self.pattern.lmo(direction, self.lower)

    def away(self, gradient: Tensor) -> Tensor:
        """Worst vertex of the smallest face that holds ``z``, bool ``[rows, d]``."""
        self.lmo_calls += 1
        lower = self.z >= 1
        return self.pattern.lmo(
            -gradient, lower if self.lower is None else lower | self.lower, self.z > 0
        )

    def total(self, values: Tensor) -> Tensor:
        """What counts for each row's step: its own value, or the sum of all, ``[rows]``."""
        return values.sum().expand_as(values) if self.joint else values

    def move(self, direction: Tensor, product: Tensor, step: Tensor) -> None:
        """``z += step * direction``, where ``product`` is ``G (w * direction)``."""
        z = (self.z + step[:, None] * direction).clamp_(0, 1)
        self.z = z.masked_fill_(z < _SNAP, 0.0).masked_fill_(z > 1 - _SNAP, 1.0)
        self.correlation = self.correlation - step[:, None] * product

    def exact_step(
        self, gradient: Tensor, direction: Tensor, product: Tensor, most: Tensor
    ) -> Tensor:
        """Minimiser of the loss along ``direction`` within ``[0, most]``, ``[rows]``."""
        slope = self.total((gradient * direction).sum(dim=1))
        curvature = 2 * self.total((self.rows.weight * direction * product).sum(dim=1))
        step = torch.where(curvature > 0, -slope / curvature, torch.inf)
        return torch.where(slope < 0, torch.minimum(step, most), 0.0)

    def take(self, index: Tensor) -> None:
        """Keep only some rows."""
        self.rows = self.rows.take(index)
        self.z, self.correlation = self.z[index], self.correlation[index]
        self.lower = None if self.lower is None else self.lower[index]


class _Rule(Protocol):
    """A way to move the rows of a batch."""

    def advance(self, batch: _Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        """Move once, given the gradient and the oracle's vertex (float64 ``[rows, d]``)."""

    def take(self, index: Tensor) -> None:
        """Keep only some rows."""


class _OpenLoop:
    """Towards the vertex, by ``2 / (t + 2)``."""

    def advance(self, batch: _Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        direction = vertex - batch.z
        step = torch.full_like(direction[:, 0], 2 / (iteration + 2))
        batch.move(direction, batch.product(direction), step)

    def take(self, index: Tensor) -> None:
        pass


class _LineSearch:
    """Towards the vertex, to the exact minimum."""

    def advance(self, batch: _Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        direction = vertex - batch.z
        product = batch.product(direction)
        most = torch.ones_like(direction[:, 0])
        batch.move(direction, product, batch.exact_step(gradient, direction, product, most))

    def take(self, index: Tensor) -> None:
        pass


class _InFace:
    """From the worst vertex of the smallest face to the best vertex of all.

    After a step that the box cut short, a row goes towards the vertex once: where many entries
    differ, one that is nearly 0 or 1 would otherwise hold up all others again and again.
    """

    def __init__(self, batch: _Batch) -> None:
        self._cut = torch.zeros_like(batch.z[:, 0], dtype=torch.bool)

    def advance(self, batch: _Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        origin = torch.where(self._cut[:, None], batch.z, batch.away(gradient).double())
        direction = vertex - origin
        product = batch.product(direction)
        room = torch.where(direction > 0, 1 - batch.z, batch.z) / direction.abs()
        most = room.masked_fill(direction == 0, torch.inf).amin(dim=1)
        if batch.joint:
            most = most.amin().expand_as(most)
        step = batch.exact_step(gradient, direction, product, most)
        self._cut = (step == most) & ~self._cut
        batch.move(direction, product, step)

    def take(self, index: Tensor) -> None:
        self._cut = self._cut[index]


class _ActiveSet:
    """From the worst of the vertices that make up ``z`` to the best vertex of all."""

    def __init__(self, batch: _Batch) -> None:
        self._vertices = batch.z[None].clone()
        self._shares = torch.ones_like(batch.z[0, :1])

    def advance(self, batch: _Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        away = int((self._vertices * gradient).sum(dim=(1, 2)).argmax())
        direction = vertex - self._vertices[away]
        product = batch.product(direction)
        most = self._shares[away].expand(len(vertex))
        step = batch.exact_step(gradient, direction, product, most)
        self._shares[away] -= step[0]
        same = (self._vertices == vertex).all(dim=2).all(dim=1).nonzero()
        if len(same):
            self._shares[int(same[0])] += step[0]
        else:
            self._vertices = torch.cat([self._vertices, vertex[None]])
            self._shares = torch.cat([self._shares, step[:1]])
        held = self._shares > _SNAP
        self._vertices, self._shares = self._vertices[held], self._shares[held]
        batch.move(direction, product, step)

    def take(self, index: Tensor) -> None:
        raise AssertionError("rows that move jointly are never taken apart")


class _Sliding:
    """Accelerated steps whose model, with a diagonal metric, is minimised cell by cell."""

    _GROWTH, _DECAY, _LEAST, _FLOOR = 1.5, 0.98, 1e-2, 1e-2

    def __init__(self, batch: _Batch, pattern: CellPattern) -> None:
        z = batch.z
        self._pattern = pattern
        self._kept = pattern.kept_per_cell((z.shape[0], z.shape[1]))
        size = batch.rows.weight**2 * batch.rows.gram.diagonal()
        mean = size.mean().expand(len(z)) if batch.joint else size.mean(dim=1)
        mean = torch.where(mean > 0, mean, 1.0)[:, None]
        self._metric = 2 * torch.maximum(size, self._FLOOR * mean)
        self._factor = torch.full_like(z[:, 0], 4.0)
        self._momentum = torch.ones_like(self._factor)
        self._ahead, self._ahead_correlation = torch.zeros_like(z), torch.zeros_like(z)
        self._multiplier = torch.zeros_like(pattern.cells(z)[:, :1])

    def advance(self, batch: _Batch, gradient: Tensor, vertex: Tensor, iteration: int) -> None:
        z, c = batch.z, batch.correlation
        y, c_y = z + self._ahead, c + self._ahead_correlation
        metric = self._factor[:, None] * self._metric
        new = self._minimise(y - batch.gradient(c_y) / metric, metric, batch.lower)
        step = new - y
        product = batch.product(step)
        new_c = c_y - product
        length = batch.total((self._metric * step**2).sum(dim=1))
        bent = 2 * batch.total((batch.rows.weight * step * product).sum(dim=1))
        curvature = torch.where(length > 0, bent / length, 0.0)
        refused = curvature > self._factor * (1 + 1e-9)
        self._factor = torch.where(
            refused,
            torch.maximum(curvature, self._GROWTH * self._factor),
            (self._DECAY * self._factor).clamp_min(self._LEAST),
        )
        uphill = batch.total((self._metric * step * (new - z)).sum(dim=1)) < 0
        old = torch.where(uphill, 1.0, self._momentum)
        momentum = (1 + (1 + 4 * old**2).sqrt()) / 2
        share = ((old - 1) / momentum)[:, None]
        self._momentum = torch.where(refused, self._momentum, momentum)
        stay = refused[:, None]
        self._ahead = torch.where(stay, self._ahead, share * (new - z))
        self._ahead_correlation = torch.where(stay, self._ahead_correlation, share * (new_c - c))
        batch.z, batch.correlation = torch.where(stay, z, new), torch.where(stay, c, new_c)

    def take(self, index: Tensor) -> None:
        self._multiplier = self._multiplier.view(len(self._factor), -1)[index].view(-1, 1)
        self._metric, self._factor = self._metric[index], self._factor[index]
        self._momentum, self._ahead = self._momentum[index], self._ahead[index]
        self._ahead_correlation = self._ahead_correlation[index]

    def _minimise(self, point: Tensor, metric: Tensor, lower: Tensor | None) -> Tensor:
        """Nearest ``z`` in the hull to ``point`` in the metric, ``[rows, d]``.

        With the multiplier ``t`` of a cell's count it is ``clip(point - t / metric)``, whose sum
        falls piecewise linearly in ``t``: Newton's method, halving the bracket if it leaves it.
        """
        cell, inverse = self._pattern.cells(point), 1 / self._pattern.cells(metric)
        least = cell.new_zeros(()) if lower is None else self._pattern.cells(lower.double())
        high = ((cell.abs() + 1) / inverse).amax(dim=1, keepdim=True)
        low = -high
        t = torch.minimum(torch.maximum(self._multiplier, low), high)
        size = cell.abs().amax(dim=1, keepdim=True) + 1
        tolerance = 4 * torch.finfo(torch.float64).eps * cell.shape[1] * size
        for _ in range(_NEWTON_STEPS):
            free = cell - t * inverse
            clipped = free.clamp_max(1.0).clamp_min(least)
            excess = clipped.sum(dim=1, keepdim=True) - self._kept
            if not bool((excess.abs() > tolerance).any()):
                break
            low, high = torch.where(excess > 0, t, low), torch.where(excess < 0, t, high)
            newton = t + excess / inverse.where(clipped == free, 0.0).sum(dim=1, keepdim=True)
            inside = (newton > low) & (newton < high)
            better = torch.where(inside, newton, (low + high) / 2)
            t = torch.where(excess.abs() > tolerance, better, t)
        self._multiplier = t
        return clipped.reshape(point.shape)


def _rule(step: str, batch: _Batch) -> _Rule:
    pattern = batch.pattern
    if step == "open_loop":
        return _OpenLoop()
    if step == "line_search":
        return _LineSearch()
    if step == "pairwise":
        return _InFace(batch) if isinstance(pattern, CellPattern) else _ActiveSet(batch)
    assert isinstance(pattern, CellPattern)
    return _Sliding(batch, pattern)


class _Run:
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
        if start is None and lower is None:
            first = problem.pattern.round(score)
        elif start is None:
            first = problem.pattern.lmo(-score, lower)
        else:
            first = start if lower is None else problem.pattern.lmo(-start.double(), lower)
        product = _Product(rows.gram, options.dtype)
        self._batch = _Batch(problem.pattern, rows, first.double(), lower, product)
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

    def relaxed(self) -> Tensor:
        """Descend; the relaxed mask."""
        self._descend()
        return self._z

    def outcome(self) -> Outcome:
        """Descend, evaluate anew, round."""
        self._descend()
        problem, rows, batch = self._problem, self._all_rows, self._batch
        last = _Batch(problem.pattern, rows, self._z, self._lower)
        gradient = last.gradient(last.correlation)
        vertex = last.lmo(gradient)
        value, gap = last.value(), (gradient * (self._z - vertex.double())).sum(dim=1)
        mask = problem.pattern.round(self._z) if self._lower is None else last.lmo(-self._z)
        objective = self._kept_objective(mask)
        bound = None
        if self._lower is None:
            bound = (value - gap - _doubt(last, gradient, vertex)) * rows.unit
            if batch.joint:
                bound = shared_out(float(bound.sum()), objective)
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
        return Outcome(mask, self._status(), bound, stats, self._trace(objective, bound))

    def _descend(self) -> None:
        options, batch = self._options, self._batch
        rule = _rule(self._step, batch)
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

    def _finished(self, batch: _Batch, gradient: Tensor, vertex: Tensor) -> Tensor:
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
        fresh = _Batch(batch.pattern, rows, batch.z[index], lower)
        gradient = fresh.gradient(fresh.correlation)
        gap = (gradient * (fresh.z - fresh.lmo(gradient).double())).sum(dim=1)
        batch.lmo_calls += fresh.lmo_calls
        batch.correlation[index] = fresh.correlation
        sure = self._small(fresh, fresh.value(), gap, self._moving[index])
        return finished.index_put((index,), sure)

    def _small(self, batch: _Batch, value: Tensor, gap: Tensor, index: Tensor) -> Tensor:
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
    """The best-scored ``floor(kept * share)`` entries of each cell, bool; None for none."""
    pattern = problem.pattern
    if share == 0:
        return None
    assert isinstance(pattern, CellPattern)
    count = math.floor(pattern.kept_per_cell(problem.shape) * share + 1e-9)
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


def _doubt(batch: _Batch, gradient: Tensor, vertex: Tensor) -> Tensor:
    """What rounding, an indefinite Gram matrix and the oracle may add to the bound, ``[rows]``.

    Rounding: sums of ``d`` products, estimated with ``|G_ij| <= sqrt(G_ii G_jj)``. Gram matrix:
    with ``C`` its correlation form and ``C >= -shift``, ``(m - z)^T Q (m - z)`` is at least
    ``-shift * sum_j w_j^2 G_jj (m_j - z_j)^2``, and the largest such sum over all masks is linear
    in ``m``.
    """
    rows, z = batch.rows, batch.z
    size = rows.weight.abs() * rows.gram.diagonal().sqrt()
    pruned = (size * (1 - z)).sum(dim=1)
    move = (z - vertex.double()).abs()
    moved = (size * move).sum(dim=1)
    linear = (rows.linear.abs() * (1 - z + move)).sum(dim=1)
    unit = torch.finfo(torch.float64).eps * (z.shape[1] + 8)
    doubt = 4 * unit * (pruned**2 + 2 * pruned * moved + linear)
    tilt = size**2 * (1 - 2 * z)
    farthest = batch.lmo(-tilt).double()
    doubt += _shift(rows.gram) * (size**2 * (farthest - z) ** 2).sum(dim=1)
    if not isinstance(batch.pattern, CellPattern):
        doubt += _ORACLE_ERROR * gradient.abs().amax()
    return doubt


def _shift(gram: Tensor) -> float:
    """A number such that the correlation form of ``gram`` plus it is positive semi-definite.

    A Cholesky factorisation that succeeds proves it up to ``d (d + 1) eps`` (Higham, theorem 10.3).
    """
    d = len(gram)
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    correlation = gram * scale * scale[:, None]
    error = 2 * d * (d + 1) * torch.finfo(torch.float64).eps
    shift = error
    while True:
        shifted = correlation.clone()
        shifted.diagonal().add_(shift)
        if int(torch.linalg.cholesky_ex(shifted).info) == 0:
            return shift + error
        shift *= 8
