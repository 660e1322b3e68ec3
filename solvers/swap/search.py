"""The swap search: from any start to a mask that no single swap improves."""

from __future__ import annotations

import math
import warnings
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..options import option
from ..pattern import CellPattern
from ..registry import register
from ..solution import Status, TracePoint
from ..solver import Outcome, Progress, Search, Solver, warm_up
from .across import AcrossRows
from .rows import RowKernel, RowResult, ScaledRows

_UNLIMITED = torch.iinfo(torch.long).max
_PASSES_PER_CALL = 100
"""Passes between two looks at the clock; each call recomputes ``c``, which bounds its drift."""


@register
@dataclass(frozen=True)
class Swap(Solver):
    """1-swap local search (SparseSwaps, arXiv 2512.10922).

    Exchanges one kept and one pruned weight while that lowers the loss: inside rows or N:M
    groups, and for `PerLayer` also between rows. Unless a limit comes first, the result has no
    improving 1-swap, established by a complete scan in float64.

    Parameters
    ----------
    candidates
        Most swaps applied per row and pass; 1 is the paper's best swap.
    max_passes
        Most passes over a row (and between rows); None runs to the local optimum.
    tolerance
        A swap counts as improving if it lowers the row's loss by more than this share of it
        (plus what float64 cannot resolve).
    dtype
        "float32" or "float64": of the scans that look for swaps. Applied swaps are always
        evaluated in float64.
    kernel
        "auto", "numba" (CPU), "triton" (CUDA) or "torch" (any device). "auto" takes the one made
        for the device; a GPU without Triton gets "torch", with a warning.

    Notes
    -----
    ``stats``: ``swaps``, ``passes`` (summed over rows), ``pairs`` (evaluated by the passes; 0 where
    the kernel does not count them), ``swaps_across_rows``, ``kernel``, and
    ``best_swap_left``: the change of the loss by the best remaining swap found in the final
    float64 scan, relative to the loss of its row (of the layer, between rows), 0 if every swap
    raises it, NaN if a limit came first.
    """

    candidates: int = option(16, least=1)
    max_passes: int | None = option(None, least=1)
    tolerance: float = option(1e-10, least=0)
    dtype: Literal["float32", "float64"] = "float32"
    kernel: Literal["auto", "numba", "triton", "torch"] = "auto"

    name = "swap"
    summary = "1-swap local search from a start, to a proven 1-swap optimum"
    patterns = (CellPattern,)
    needs_start = True
    rowwise = True

    def prepare(self, device: torch.device) -> None:
        warm_up(Swap(), device)

    def _search(self, search: Search) -> Outcome:
        return _Run(self, search).outcome()


class _Run:
    """One search: the mask, what is known of each row, and what was counted."""

    def __init__(self, options: Swap, search: Search) -> None:
        problem = search.problem
        neighbourhood = problem.pattern.neighbourhood(problem.shape)
        assert search.start is not None
        assert neighbourhood is not None
        self._options, self._clock, self._callback = options, search.clock, search.callback
        self._neighbourhood = neighbourhood
        self._mask = mask = search.start.clone()
        self._rows = ScaledRows.of(problem)
        self._kernel_name, self._kernel = self._pick_kernel(problem.device)
        self._loss = search.start_objective.clone()
        self._best_left = torch.full_like(self._loss, torch.nan)
        self._budget = torch.full(
            self._loss.shape, options.max_passes or _UNLIMITED, device=mask.device
        )
        self._passes = self._pairs = self._swaps = self._swaps_across = 0
        self._trace: list[TracePoint] = []

    def outcome(self) -> Outcome:
        """Search until no swap improves or a limit is hit."""
        self._report()
        everything = torch.arange(len(self._mask), device=self._mask.device)
        if self._neighbourhood.across_rows:
            left_across = self._inside_and_across(everything)
        else:
            self._inside(everything)
            left_across = 0.0
        left = self._best_left_share(left_across)
        return Outcome(
            mask=self._mask,
            status=self._status(left),
            stats={
                "swaps": self._swaps + self._swaps_across,
                "swaps_across_rows": self._swaps_across,
                "passes": self._passes,
                "pairs": self._pairs,
                "best_swap_left": left,
                "kernel": self._kernel_name,
            },
            trace=self._trace,
        )

    def _pick_kernel(self, device: torch.device) -> tuple[str, RowKernel]:
        options = self._options
        name = options.kernel if options.kernel != "auto" else _kernel_for(device)
        arguments = (
            self._rows,
            self._neighbourhood.width,
            options.candidates,
            options.tolerance,
            torch.float32 if options.dtype == "float32" else torch.float64,
        )
        if name == "torch":
            from .dense import DenseKernel

            return name, DenseKernel(*arguments)
        if name == "triton":
            _require_triton()
            from .triton import TritonKernel

            return name, TritonKernel(*arguments)
        if device.type != "cpu":
            raise InvalidInput(f"kernel 'numba' runs on the CPU, not on {device}; use 'torch'.")
        from .cpu import CpuKernel

        return name, CpuKernel(*arguments)

    def _inside(self, index: Tensor) -> None:
        """Swaps inside the rows ``index``, in chunks, until none improves."""
        waiting = deque(torch.split(index, self._kernel.rows_per_call(len(index))))
        running: dict[Future[RowResult], tuple[Tensor, Tensor]] = {}
        with ThreadPoolExecutor(self._kernel.parallel_calls) as pool:
            while running or (waiting and not self._clock.expired):
                while waiting and len(running) < 2 * self._kernel.parallel_calls:
                    rows = waiting.popleft()
                    block = self._mask[rows]
                    passes = min(int(self._budget[rows].min()), _PASSES_PER_CALL)
                    running[pool.submit(self._kernel.improve, rows, block, passes)] = rows, block
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    unfinished = self._record(future.result(), *running.pop(future))
                    if len(unfinished):
                        waiting.append(unfinished)
                    self._report()
                if self._clock.expired:
                    waiting.clear()

    def _record(self, result: RowResult, rows: Tensor, block: Tensor) -> Tensor:
        """Write a kernel's result back; the rows that it left unfinished."""
        self._mask[rows] = block
        self._loss[rows] = result.loss * self._rows.unit[rows]
        self._best_left[rows] = result.best_left * self._rows.unit[rows]
        self._budget[rows] -= result.passes
        self._swaps += result.swaps
        self._passes += int(result.passes.sum())
        self._pairs += result.pairs
        return rows[result.best_left.isnan() & (self._budget[rows] > 0)]

    def _inside_and_across(self, everything: Tensor) -> float:
        """Swaps inside and between rows in turn; the best change left between rows, or NaN."""
        across = AcrossRows(self._rows, self._options.tolerance)
        budget = self._options.max_passes or _UNLIMITED
        touched = everything
        while True:
            self._inside(touched)
            before = self._mask.clone()
            left: float | None = None
            while left is None and budget > 0 and not self._clock.expired:
                result = across.improve(self._mask, min(budget, _PASSES_PER_CALL))
                left = result.best_left
                budget -= result.passes
                self._swaps_across += result.swaps
            touched = (self._mask != before).any(dim=1).nonzero().flatten()
            self._loss = self._rows.loss(self._mask, self._rows.correlation(self._mask))
            self._loss *= self._rows.unit
            self._best_left[touched] = torch.nan
            touched = touched[self._budget[touched] > 0]
            if left is None or len(touched) == 0 or self._clock.expired:
                return torch.nan if left is None else left

    def _best_left_share(self, left_across: float) -> float:
        """Change by the best swap left, as a share of the loss; NaN if not all was scanned."""
        size = self._loss.abs()
        inside = torch.where(self._best_left == 0, 0.0, self._best_left / size)
        total = float(size.sum())
        # NaN, where not all was scanned, stays NaN also beside a loss of 0.
        across = left_across / (total or 1.0) if left_across else 0.0
        return float(torch.tensor([float(inside.min()), across], dtype=torch.float64).min())

    def _status(self, left: float) -> Status:
        if not math.isnan(left):
            return Status.LOCAL_OPTIMUM
        return Status.TIME_LIMIT if self._clock.expired else Status.ITERATION_LIMIT

    def _report(self) -> None:
        self._trace.append(TracePoint(self._clock.seconds, float(self._loss.sum())))
        if self._callback is not None:
            done = int(self._best_left.isfinite().sum())
            self._callback(Progress(done, len(self._loss), self._clock.seconds))


def _kernel_for(device: torch.device) -> str:
    """The kernel made for a device that can run here."""
    if device.type == "cpu":
        return "numba"
    if device.type == "cuda":
        try:
            _require_triton()
        except InvalidInput as error:
            _say_once(f"{error} Until then the slower torch kernel searches.")
        else:
            return "triton"
    return "torch"


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            f"The GPU swap kernel needs Triton ({error}); pip install triton mends it."
        ) from error


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
