"""Swap kernel in plain torch, for any device: chunks of the [rows, d, d] difference tensor.

The same passes as `cpu.CpuKernel`, batched over rows: for every index of the larger side its best
partner on the smaller side, then up to ``candidates`` pairs, each re-evaluated in float64 against
the current ``c``; a row ends by a complete float64 scan.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows import RowResult, ScaledRows

_CHUNK_BYTES = 1 << 28
"""Size of one chunk of the difference tensor."""


class DenseKernel:
    """`RowKernel` in torch; parameters as for `cpu.CpuKernel`."""

    def __init__(
        self,
        rows: ScaledRows,
        width: int,
        candidates: int,
        tolerance: float,
        scan_dtype: torch.dtype,
    ) -> None:
        self._rows = rows
        self._width, self._candidates, self._tolerance = width, candidates, tolerance
        self._scans = [scan_dtype] if scan_dtype == torch.float64 else [scan_dtype, torch.float64]
        self.parallel_calls = 1
        d = rows.gram.shape[0]
        blocks = rows.gram.view(d // width, width, d)
        starts = torch.arange(0, d, width, device=rows.gram.device)[:, None, None]
        inside = starts + torch.arange(width, device=rows.gram.device)
        self._blocks = blocks.gather(2, inside.expand(-1, width, -1))
        """Diagonal blocks of the Gram matrix, ``[d / width, width, width]``."""

    def rows_per_call(self, rows: int) -> int:
        """So many that copies of the rows stay small beside a chunk."""
        return max(1, min(rows, _CHUNK_BYTES // (16 * self._rows.gram.shape[0])))

    def improve(self, index: Tensor, mask: Tensor, max_passes: int) -> RowResult:
        """Improve ``mask`` in place; see `RowKernel`."""
        passes = torch.zeros(len(index), dtype=torch.long, device=mask.device)
        best_left = torch.full((len(index),), math.nan, dtype=torch.float64, device=mask.device)
        swaps = 0
        for dtype in self._scans:
            best_left.fill_(math.nan)
            active = (passes < max_passes).nonzero().flatten()
            while len(active) > 0:
                rows, block = self._rows.take(index[active]), mask[active]
                applied, least = self._one_pass(rows, block, dtype)
                mask[active] = block
                passes[active] += 1
                swaps += int(applied.sum())
                best_left[active] = least.where(applied == 0, math.nan)
                active = active[(applied > 0) & (passes[active] < max_passes)]
        rows = self._rows.take(index)
        return RowResult(swaps, passes, rows.loss(mask, rows.correlation(mask)), best_left)

    def _one_pass(
        self, rows: ScaledRows, keep: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """One pass, changing ``keep``: swaps applied and the best value found, per row."""
        c = rows.correlation(keep)
        flip = rows.flip_cost(keep, c)
        threshold = -(self._tolerance * rows.loss(keep, c).abs() + rows.noise)
        outer_kept = 2 * keep.sum(dim=1, keepdim=True) > keep.shape[1]
        is_outer = keep == outer_kept
        inner = flip.masked_fill(is_outer, math.inf)

        weight = rows.weight.to(dtype)
        best = self._best_values(weight, inner.to(dtype)) + flip.to(dtype)
        best.masked_fill_(~is_outer, math.inf)
        count = min(self._candidates, best.shape[1])
        order = best.argsort(dim=1, stable=True)[:, :count]
        promised = best.gather(1, order)
        applied = torch.zeros(len(keep), dtype=torch.long, device=keep.device)
        each = torch.arange(len(keep), device=keep.device)
        for k in range(count):
            o = order[:, k]
            live = promised[:, k] < threshold
            if not bool(live.any()):
                break
            i, value = self._partner(weight, inner.to(dtype), o)
            u, p = torch.where(outer_kept[:, 0], o, i), torch.where(outer_kept[:, 0], i, o)
            w_u, w_p = rows.weight[each, u], rows.weight[each, p]
            diagonal = rows.gram.diagonal()
            delta = (
                2 * w_u * c[each, u] + w_u**2 * diagonal[u] + rows.linear[each, u]
                - 2 * w_p * c[each, p] + w_p**2 * diagonal[p] - rows.linear[each, p]
                - 2 * w_u * w_p * rows.gram[u, p]
            )  # fmt: skip
            good = live & torch.isfinite(value) & (delta < threshold)
            at, u, p = each[good], u[good], p[good]
            keep[at, u] = False
            keep[at, p] = True
            c[at] += w_u[good, None] * rows.gram[u] - w_p[good, None] * rows.gram[p]
            inner = rows.flip_cost(keep, c).masked_fill(keep == outer_kept, math.inf)
            applied[at] += 1
        return applied, promised[:, 0].clamp(max=0.0).double()

    def _best_values(self, weight: Tensor, inner: Tensor) -> Tensor:
        """``min_i inner_i - 2 w_o w_i G_oi`` over the block of each ``o``, ``[rows, d]``."""
        rows, d = weight.shape
        blocks = self._blocks.to(weight.dtype)
        best = torch.empty_like(weight)
        step = max(1, _CHUNK_BYTES // (d * self._width * weight.element_size()))
        for at in range(0, rows, step):
            w = weight[at : at + step].view(-1, d // self._width, self._width)
            cost = inner[at : at + step].view_as(w)
            pair = w[..., :, None] * w[..., None, :] * blocks
            difference = cost[..., None, :] - 2 * pair
            best[at : at + step] = difference.amin(dim=-1).view(-1, d)
        return best

    def _partner(self, weight: Tensor, inner: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        """Best partner of ``o`` in its block, per row, and its value."""
        block, place = o // self._width, o % self._width
        each = torch.arange(len(o), device=o.device)
        w = weight.view(len(o), -1, self._width)[each, block]
        cost = inner.view(len(o), -1, self._width)[each, block]
        gram = self._blocks[block, place].to(weight.dtype)
        value, i = (cost - 2 * weight[each, o, None] * w * gram).min(dim=1)
        return i + block * self._width, value
