"""Tabu search over the rows of a problem, between two swap searches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import Clock
from ..errors import InvalidInput
from ..options import option
from ..pattern import NM, PerLayer, PerRow
from ..problem import MaskProblem
from ..registry import register
from ..solution import Status, TracePoint
from ..solver import Callback, Outcome, Progress, Search, Solver, warm_up
from ..swap import Swap
from ..swap.rows import ScaledRows

_PER_CALL = 2000
"""Iterations of a row between two fresh computations of ``c``, and two looks at the clock."""


@register
@dataclass(frozen=True)
class Tabu(Solver):
    """Tabu search over 1-swaps with restarts and path relinking (Glover, 1989), on the CPU.

    Begins and ends with `Swap`, so that unless a time limit comes first the mask is also a 1-swap
    optimum. Rows are searched one by one; a budget that rows share is only moved between them by
    the swaps at both ends.

    Parameters
    ----------
    iterations
        Moves per row; None goes on until the time limit, which must then be given.
    candidates
        Weights to prune that are tried per move, each with every weight it may revive; all of
        them, where there are no more.
    tenure
        A swapped weight may not move for ``tenure`` to ``2 tenure`` iterations (less where cells
        are small).
    stall
        Moves without a new best mask after which a row restarts near its best mask.

    Notes
    -----
    Options were chosen on rows of 384 inputs at 60 % (benchmarks/search_quality.py). ``stats``:
    ``iterations`` and ``restarts`` (summed over rows), ``swap_loss`` (of the swap search it began
    with), ``best_swap_left`` as for `Swap`.
    """

    iterations: int | None = option(16000, least=1)
    candidates: int = option(8, least=1)
    tenure: int = option(4, least=1)
    stall: int = option(300, least=1)

    name = "tabu"
    summary = "tabu search over swaps, with restarts; beyond local optima"
    patterns = (PerRow, NM, PerLayer)
    needs_start = True
    requires = ("numba",)

    def prepare(self, device: torch.device) -> None:
        Swap().prepare(device)
        warm_up(Tabu(iterations=2), device)

    def _search(self, search: Search) -> Outcome:
        problem, start, clock = search.problem, search.start, search.clock
        assert start is not None
        if self.iterations is None and clock.limit is None:
            raise InvalidInput("iterations=None needs a time limit; give one of the two.")
        trace = [TracePoint(clock.seconds, float(search.start_objective.sum()))]
        first = Swap().solve(problem, start=start, time_limit=clock.limit)
        trace.append(TracePoint(clock.seconds, float(first.objective.sum())))
        rows = _Rows(self, problem.to("cpu"), first.mask.cpu(), search.seed)
        loss = rows.search(clock, search.callback)
        for time, value in loss:  # summed otherwise than by the problem, so equal but for rounding
            trace.append(TracePoint(time, min(value, trace[-1].objective)))
        mask = rows.best(problem.device)
        last = None if clock.expired else Swap().solve(problem, start=mask, time_limit=clock.limit)
        if last is not None:
            mask = last.mask
            value = float(last.objective.sum())
            trace.append(TracePoint(clock.seconds, min(value, trace[-1].objective)))
        stats: dict[str, Any] = {
            "iterations": rows.iterations,
            "restarts": rows.restarts,
            "swap_loss": float(first.objective.sum()),
            "best_swap_left": float("nan") if last is None else last.stats["best_swap_left"],
        }
        status = Status.TIME_LIMIT if last is None else last.status
        return Outcome(mask, status, stats=stats, trace=trace)


class _Rows:
    """The state of every row's search."""

    def __init__(self, options: Tabu, problem: MaskProblem, mask: Tensor, seed: int) -> None:
        neighbourhood = problem.pattern.neighbourhood(problem.shape)
        assert neighbourhood is not None
        self._options, self._width = options, neighbourhood.width
        self._scaled = ScaledRows.of(problem)
        self._gram = self._scaled.gram.contiguous().numpy()
        self._keep = mask.contiguous().numpy().copy()
        self._best, self._elite = self._keep.copy(), self._keep.copy()
        self._stamp = np.zeros(self._keep.shape, np.int64)
        self._counters = np.zeros((len(self._keep), 3), np.int64)
        random = np.random.default_rng(seed)
        self._random = random.integers(1, 2**62, size=(len(self._keep), 1), dtype=np.uint64)
        self._value = np.full(len(self._keep), np.inf)

    def search(self, clock: Clock, callback: Callback | None) -> list[tuple[float, float]]:
        """Rounds over all rows until the iterations or the time are spent; loss over time."""
        total, done = self._options.iterations, 0
        history = []
        rows = len(self._keep)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            while not clock.expired and (total is None or done < total):
                step = _PER_CALL if total is None else min(_PER_CALL, total - done)
                for _ in pool.map(lambda r, n=step: self._advance(r, n, clock), range(rows)):
                    pass
                done += step
                if np.isfinite(self._value).all():
                    unit = self._scaled.unit.numpy()
                    history.append((clock.seconds, float((self._value * unit).sum())))
                if callback is not None:
                    finished = 0 if total is None else rows * done // total
                    callback(Progress(finished, rows, clock.seconds))
        return history

    def best(self, device: torch.device) -> Tensor:
        """The best masks found."""
        return torch.from_numpy(self._best).to(device)

    @property
    def iterations(self) -> int:
        """Moves made, over all rows."""
        return int(self._counters[:, 0].sum())

    @property
    def restarts(self) -> int:
        """Restarts, over all rows."""
        return int(self._counters[:, 2].sum())

    def _advance(self, r: int, iterations: int, clock: Clock) -> None:
        from .kernel import search_row

        if clock.expired:
            return
        options, scaled = self._options, self._scaled
        smaller = int(min(self._keep[r].sum(), (~self._keep[r]).sum()))
        movable = max(1, smaller // 4)
        self._value[r] = search_row(
            scaled.weight[r].numpy(),
            scaled.linear[r].numpy(),
            self._gram,
            float(scaled.noise[r]),
            self._keep[r],
            self._best[r],
            self._elite[r],
            self._stamp[r],
            self._counters[r],
            self._random[r],
            self._width,
            min(options.candidates, self._keep.shape[1]),
            min(options.tenure, movable),
            options.stall,
            iterations,
        )
