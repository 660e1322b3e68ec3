"""Fused swap kernel for the CPU (numba): nothing of size [rows, d, d], no gather.

A *pass* over a row finds, for every index of the larger side (kept or pruned), its best
partner on the smaller side, then applies up to ``candidates`` of these pairs, best first, each
re-evaluated in float64 against the current ``c``; an index whose partner is taken by then takes
the next best. Scanning may be in float32; every applied swap is an improvement in float64, and
a row is only finished by a complete float64 scan that finds none.

The smaller side is the loop's *scalar* side, the larger its vector side. Scalar indices whose
best conceivable pair cannot improve are skipped, which never changes the answer: with
``alpha_j = |w_j| sqrt(G_jj)`` and ``rho_j`` the largest absolute correlation of input j with
any other, ``|2 w_i w_j G_ij| <= 2 alpha_i alpha_j rho_i``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from .rows import RowResult, ScaledRows

Array = npt.NDArray[Any]

_FAST = {"nnan", "ninf", "nsz", "contract", "reassoc"}
_BIG = 1e30
_ENTRIES_PER_CALL = 1 << 25


class CpuKernel:
    """`RowKernel` on the CPU; calls on disjoint rows may run in parallel threads.

    Parameters
    ----------
    rows
        The problem, on the CPU.
    width
        Swaps stay inside blocks of so many consecutive inputs.
    candidates
        Most pairs applied per row and pass.
    tolerance
        A swap improves if it lowers the row's loss by more than this share of it.
    scan_dtype
        torch.float32 or torch.float64, of the first scans; the last is always float64.
    """

    def __init__(
        self,
        rows: ScaledRows,
        width: int,
        candidates: int,
        tolerance: float,
        scan_dtype: torch.dtype,
    ) -> None:
        self._rows = rows
        self._gram = rows.gram.contiguous().numpy()
        self._width, self._candidates, self._tolerance = width, candidates, tolerance
        self._scans = [self._gram]
        if scan_dtype == torch.float32:
            self._scans.insert(0, rows.gram.float().contiguous().numpy())
        self._rho = _largest_correlation(rows.gram).numpy()
        self.parallel_calls = torch.get_num_threads()

    def rows_per_call(self, rows: int) -> int:
        """So many that a call is short, and that all threads have several calls to take."""
        d = self._gram.shape[0]
        fair = -(-rows // (4 * self.parallel_calls))
        most: int = _ENTRIES_PER_CALL // d**2
        return max(1, min(fair, most))

    def improve(self, index: Tensor, mask: Tensor, max_passes: int) -> RowResult:
        """Improve ``mask`` in place; see `RowKernel`."""
        rows = self._rows.take(index)
        passes = torch.zeros(len(index), dtype=torch.long)
        loss = torch.empty(len(index), dtype=torch.float64)
        best_left = torch.empty_like(loss)
        swaps = 0
        for scan in self._scans:
            swaps += _improve_rows(
                rows.weight.numpy(),
                rows.linear.numpy(),
                self._gram,
                scan,
                self._rho,
                rows.noise.numpy(),
                mask.numpy(),
                self._width,
                self._candidates,
                max_passes,
                self._tolerance,
                passes.numpy(),
                loss.numpy(),
                best_left.numpy(),
            )
        return RowResult(swaps, passes, loss, best_left)


def _largest_correlation(gram: Tensor) -> Tensor:
    """``max_{i != j} |G_ij| / sqrt(G_ii G_jj)`` for each j, rounded up a little."""
    scale = torch.where(gram.diagonal() > 0, gram.diagonal().rsqrt(), 0.0)
    correlation = (gram * scale * scale[:, None]).abs_()
    correlation.fill_diagonal_(0.0)
    return correlation.amax(dim=0) * (1 + 1e-12)


def _compiled(function: Callable[..., Any]) -> Any:
    return njit(nogil=True, cache=True, fastmath=_FAST)(function)


@_compiled
def _scan_four(
    gram: Array, weight: Array, cost: Array, scalar: Array, at: int, best: Array
) -> None:
    """``best_j = min(best_j, cost_s - 2 w_s w_j G_sj)`` for four scalar indices s and all j.

    A minimum per vector element, not a reduction: compilers vectorise it without conditions.
    """
    s0, s1, s2, s3 = scalar[at], scalar[at + 1], scalar[at + 2], scalar[at + 3]
    c0, c1, c2, c3 = cost[s0], cost[s1], cost[s2], cost[s3]
    two = weight.dtype.type(2)  # an int literal would turn float32 into float64
    w0, w1, w2, w3 = two * weight[s0], two * weight[s1], two * weight[s2], two * weight[s3]
    for j in range(len(best)):
        w = weight[j]
        v0 = c0 - w0 * (w * gram[s0, j])
        v1 = c1 - w1 * (w * gram[s1, j])
        v2 = c2 - w2 * (w * gram[s2, j])
        v3 = c3 - w3 * (w * gram[s3, j])
        v0 = v0 if v0 < v1 else v1
        v2 = v2 if v2 < v3 else v3
        v0 = v0 if v0 < v2 else v2
        best[j] = v0 if v0 < best[j] else best[j]


@_compiled
def _partner(
    gram: Array, weight: Array, cost: Array, keep: Array, j: int, low: int, high: int
) -> int:
    """Best partner of j: least ``cost_s - 2 w_s w_j G_sj`` on the other side, in low..high-1.

    -1 if none is left.
    """
    w = weight.dtype.type(2) * weight[j]
    partner, least = -1, gram.dtype.type(_BIG / 2)
    for s in range(low, high):
        if keep[s] != keep[j]:
            value = cost[s] - w * (weight[s] * gram[j, s])
            if value < least:
                partner, least = s, value
    return partner


@_compiled
def _improve_rows(
    weight: Array,
    linear: Array,
    gram: Array,
    scan: Array,
    rho: Array,
    noise: Array,
    mask: Array,
    width: int,
    candidates: int,
    max_passes: int,
    tolerance: float,
    passes: Array,
    loss: Array,
    best_left: Array,
) -> int:
    """Passes of some rows until none improves; the number of swaps.

    ``scan`` is ``gram`` in the dtype that pairs are scanned in; ``passes`` counts on from what
    it holds, up to ``max_passes``.
    """
    rows, d = weight.shape
    dtype = scan.dtype.type
    c = np.empty(d)
    flip = np.empty(d)
    alpha = np.empty(d)
    w_scan = np.empty(d, scan.dtype)
    cost = np.empty(d, scan.dtype)
    best = np.empty(d, scan.dtype)
    scalar = np.empty(d + 4, np.int64)
    improving = np.empty(d, np.int64)
    swaps = 0
    for r in range(rows):
        w, keep = weight[r], mask[r]
        c[:] = 0.0
        value = 0.0
        for j in range(d):
            w_scan[j] = w[j]
            alpha[j] = abs(w[j]) * np.sqrt(gram[j, j])
            if not keep[j]:
                for i in range(d):
                    c[i] += w[j] * gram[j, i]
        kept = 0
        for j in range(d):
            if keep[j]:
                kept += 1
            else:
                value += w[j] * c[j] + linear[r, j]
        scalar_kept = 2 * kept <= d

        left = np.nan
        while passes[r] < max_passes:
            passes[r] += 1
            threshold = -(tolerance * abs(value) + noise[r])
            for j in range(d):
                sign = 1.0 if keep[j] else -1.0
                flip[j] = sign * (2 * w[j] * c[j] + linear[r, j]) + w[j] * w[j] * gram[j, j]
                cost[j] = flip[j]
                best[j] = _BIG

            # Scalar indices that may have an improving partner in their block.
            n = 0
            for low in range(0, d, width):
                high = min(low + width, d)
                least, largest = _BIG, 0.0
                for j in range(low, high):
                    if keep[j] != scalar_kept:
                        least = min(least, flip[j])
                        largest = max(largest, alpha[j])
                for j in range(low, high):
                    reach = 2 * rho[j] * alpha[j] * largest
                    if keep[j] == scalar_kept and flip[j] + least - reach < threshold:
                        scalar[n] = j
                        n += 1

            # The value of the best partner, for every index of the other side.
            if width == d:
                for k in range(n, n + 3):
                    scalar[k] = scalar[0]
                for k in range(0, n, 4):
                    _scan_four(scan, w_scan, cost, scalar, k, best)
            else:
                for k in range(n):
                    s = scalar[k]
                    low = s - s % width
                    for j in range(low, low + width):
                        pair = dtype(2) * w_scan[s] * (w_scan[j] * scan[s, j])
                        best[j] = min(best[j], cost[s] - pair)
            m = 0
            least = 0.0
            for j in range(d):
                if keep[j] != scalar_kept:
                    best[j] += cost[j]
                    least = min(least, best[j])
                    if best[j] < threshold:
                        improving[m] = j
                        m += 1

            # Apply the best of them, each against the current c.
            applied = 0
            order = np.argsort(best[improving[:m]], kind="mergesort")
            for k in range(min(m, candidates)):
                j = improving[order[k]]
                low = j - j % width
                s = _partner(scan, w_scan, cost, keep, j, low, low + width)
                if s < 0:
                    continue
                u, p = (s, j) if scalar_kept else (j, s)
                delta = (
                    2 * w[u] * c[u] + w[u] * w[u] * gram[u, u] + linear[r, u]
                    - 2 * w[p] * c[p] + w[p] * w[p] * gram[p, p] - linear[r, p]
                    - 2 * w[u] * w[p] * gram[u, p]
                )  # fmt: skip
                if delta < threshold:
                    keep[u], keep[p] = False, True
                    cost[s] = cost[j] = _BIG
                    for i in range(d):
                        c[i] += w[u] * gram[u, i] - w[p] * gram[p, i]
                    value += delta
                    applied += 1
            swaps += applied
            if applied == 0:
                left = least
                break
        loss[r], best_left[r] = value, left
    return swaps
