"""Fused swap kernels for GPUs (Triton): nothing of size [rows, d, d] in memory.

The same passes as `cpu.CpuKernel`. One pass is three launches:

- ``_pack`` lays out, for every block of rows, the costs and weights of the scalar indices that
  any of its rows still needs (see `cpu` for the bound that drops the others, which never
  changes the answer);
- ``_scan_rows`` takes a slice of each of their rows of the Gram matrix from memory once, for the
  whole block, and keeps the minimum of every vector index in registers: per pair two products,
  one subtraction from the cost (fused with a product) and one minimum;
- ``_swap`` holds one row in registers, takes its best pairs one after another, and evaluates each
  in float64 against the current ``c``, which it updates.

The float64 scan that ends a row is a float32 scan with an error bound: only the indices whose
float32 value does not prove that all their pairs raise the loss are evaluated again in float64.
Minima do not depend on the order they are taken in and ties go to the lower index, so that the
result does not depend on the sizes of the tiles.

With ``TRITON_INTERPRET=1`` in the environment before the import the kernels run on the CPU.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import InvalidInput
from .rows import RowResult, ScaledRows, largest_correlation

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether the kernels run on the CPU."""

_ROWS = 8
"""Rows that share a tile of the Gram matrix."""

_STEP = 4
"""Scalar indices between two checks of the loop; the pack is padded to a multiple."""

_BYTES_PER_CALL = 1 << 32
"""Most memory for the state of the rows of one call."""

_DOUBT = 32
"""A float32 scan errs by fewer than so many roundings of the largest term of a pair."""


class TritonKernel:
    """`RowKernel` in Triton; parameters as for `cpu.CpuKernel`.

    Raises
    ------
    InvalidInput
        If the problem is on the CPU and the kernels are not interpreted.
    """

    def __init__(
        self,
        rows: ScaledRows,
        width: int,
        candidates: int,
        tolerance: float,
        scan_dtype: torch.dtype,
    ) -> None:
        device = rows.gram.device
        if device.type != "cuda" and not INTERPRETED:
            raise InvalidInput(
                f"kernel 'triton' runs on CUDA GPUs, not on {device}; "
                "use 'numba', or set TRITON_INTERPRET=1 to debug it."
            )
        self._rows = rows
        self._width, self._candidates, self._dtype = width, candidates, scan_dtype
        self._tolerance = torch.tensor([tolerance], dtype=torch.float64, device=device)
        self._gram = rows.gram.contiguous()
        self._scan_gram = self._gram.to(scan_dtype)
        self._diagonal = self._gram.diagonal().contiguous()
        self._rho = largest_correlation(self._gram)
        self._largest = self._gram.abs().amax(dim=0)
        self.parallel_calls = 1

    def rows_per_call(self, rows: int) -> int:
        """All of them, if their state fits."""
        budget = _BYTES_PER_CALL
        if self._gram.is_cuda:
            budget = min(budget, torch.cuda.mem_get_info(self._gram.device)[0] // 4)
        scan_bytes = 6 * self._dtype.itemsize
        return max(1, min(rows, budget // (self._gram.shape[0] * (26 + scan_bytes))))

    def improve(self, index: Tensor, mask: Tensor, max_passes: int) -> RowResult:
        """Improve ``mask`` in place; see `RowKernel`."""
        with self._on_device():
            return self._improve(index, mask, max_passes)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._gram.device) if self._gram.is_cuda else nullcontext()

    def _improve(self, index: Tensor, mask: Tensor, max_passes: int) -> RowResult:
        state = _State(self._rows.take(index), mask, self._dtype)
        passes = torch.zeros(len(index), dtype=torch.long, device=mask.device)
        best_left = torch.full_like(state.loss, math.nan)
        swaps = 0
        self._swap(state, _every(state), None)
        proofs = [False] if self._dtype == torch.float64 else [False, True]
        for proof in proofs:
            active = (passes < max_passes).nonzero().flatten()
            while len(active) > 0:
                best = self._scan(state, active)
                if proof:
                    best = self._recheck(state, active, best)
                applied, least = self._swap(state, active, best)
                passes[active] += 1
                swaps += int(applied.sum())
                proven = proof or len(proofs) == 1
                best_left[active] = least.where((applied == 0) & proven, math.nan)
                active = active[(applied > 0) & (passes[active] < max_passes)]
        mask.copy_(state.keep)
        return RowResult(swaps, passes, state.loss, best_left)

    def _scan(self, state: _State, active: Tensor) -> Tensor:
        """The value of the best partner of each vector index, ``[active, d]``; infinite elsewhere.

        Pairs that the bound discards may be left out.
        """
        n, d = len(active), len(self._gram)
        best = torch.empty(n, d, dtype=self._dtype, device=active.device)
        if self._width < d:
            tile = min(1024, triton.next_power_of_2(d))
            _scan_blocks[n, triton.cdiv(d, tile)](
                self._scan_gram, state.scan_weight, state.inner, state.outer, best, active,
                d, self._width, tile,
            )  # fmt: skip
            return best
        blocks, length = triton.cdiv(n, _ROWS), d + _STEP
        size = triton.next_power_of_2(d)
        packed = best.new_empty(blocks, length, 2, _ROWS)
        order = torch.empty(blocks, length, dtype=torch.int32, device=active.device)
        count = torch.empty(blocks, dtype=torch.int32, device=active.device)
        _pack[blocks,](
            state.inner, state.scan_weight, state.hopeful, active, packed, order, count,
            n, d, length, _ROWS, _STEP, size, num_warps=_warps(size),
        )  # fmt: skip
        tile, warps = self._tile(blocks)
        _scan_rows[blocks, triton.cdiv(d, tile)](
            self._scan_gram, state.scan_weight, state.outer, best, active, packed, order, count,
            n, d, length, _ROWS, _STEP, tile, num_warps=warps,
        )  # fmt: skip
        return best

    def _tile(self, blocks: int) -> tuple[int, int]:
        """Width and warps of a tile: 16 bytes a thread, narrower where blocks are few."""
        d = len(self._gram)
        per_warp = 32 * 16 // self._dtype.itemsize
        warps = 4
        if self._gram.is_cuda:
            units = torch.cuda.get_device_properties(self._gram.device).multi_processor_count
            while warps > 1 and blocks * triton.cdiv(d, warps * per_warp) < 3 * units:
                warps //= 2
        return warps * per_warp, warps

    def _recheck(self, state: _State, active: Tensor, best: Tensor) -> Tensor:
        """``best`` in float64 where an improving pair is not ruled out; infinite elsewhere.

        With ``|G_ij| <= L_j``, the terms of a pair of j whose value is below its cost are at most
        ``|cost_j| + 2 |w_j| L_j max |w|``, and its float32 value errs by a few roundings of that.
        """
        rows = state.rows
        largest = rows.weight[active].abs().amax(dim=1, keepdim=True)
        term = 2 * rows.weight[active].abs() * self._largest * largest
        term += state.outer[active].double().abs()
        doubt = _DOUBT * torch.finfo(best.dtype).eps * term
        at = (best.double() < doubt) & best.isfinite()
        slot, j = at.nonzero(as_tuple=True)
        exact = torch.full(best.shape, math.inf, dtype=torch.float64, device=best.device)
        if len(slot) > 0:
            _recheck[len(slot),](
                self._gram, self._diagonal, rows.weight, rows.linear, state.correlation,
                state.keep_bytes, exact, active, slot, j,
                len(self._gram), self._width, min(1024, triton.next_power_of_2(self._width)),
            )  # fmt: skip
        return exact

    def _swap(self, state: _State, active: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor]:
        """Apply the best pairs: how many, and the least value; without ``best`` only prepare."""
        rows, d = state.rows, len(self._gram)
        applied = torch.empty(len(active), dtype=torch.int32, device=active.device)
        least = torch.empty(len(active), dtype=torch.float64, device=active.device)
        gram = self._gram if best is not None and best.dtype == torch.float64 else self._scan_gram
        size = triton.next_power_of_2(d)
        _swap[len(active),](
            state.outer if best is None else best, active,
            rows.weight, rows.linear, self._gram, gram, self._diagonal, self._rho, rows.noise,
            state.loss, state.scalar_kept, state.keep_bytes, state.correlation,
            state.inner, state.outer, state.hopeful, applied, least, self._tolerance,
            d, self._width, 0 if best is None else self._candidates, size, num_warps=_warps(size),
        )  # fmt: skip
        return applied, least


class _State:
    """What the kernels read and write of the rows of one call.

    Attributes
    ----------
    keep, keep_bytes
        ``[rows, d]``: the mask, and its bytes.
    correlation
        ``c``, float64 ``[rows, d]``.
    loss
        Float64 ``[rows]``.
    scalar_kept
        ``[rows]``: whether the kept side is the smaller one.
    scan_weight, inner, outer
        In the dtype of scans, ``[rows, d]``: weights, and flip costs of the smaller and of the
        larger side, infinite on the other.
    hopeful
        ``[rows, d]``: scalar indices that may have an improving partner.
    """

    def __init__(self, rows: ScaledRows, mask: Tensor, dtype: torch.dtype) -> None:
        self.rows = rows
        self.keep = mask.contiguous().clone()
        self.keep_bytes = self.keep.view(torch.uint8)
        self.correlation = rows.correlation(mask)
        self.loss = rows.loss(mask, self.correlation)
        self.scalar_kept = (2 * mask.sum(dim=1) <= mask.shape[1]).to(torch.uint8)
        self.scan_weight = rows.weight.to(dtype)
        self.inner = torch.empty_like(self.scan_weight)
        self.outer = torch.full_like(self.scan_weight, math.inf)
        self.hopeful = torch.empty_like(self.keep_bytes)


def _every(state: _State) -> Tensor:
    return torch.arange(len(state.loss), device=state.loss.device)


def _warps(size: int) -> int:
    """Warps for a program that holds a row of ``size``: 8 entries a thread."""
    return min(32, max(1, size // 256))


def _kernel(function: Callable[..., Any]) -> Any:
    """Compiled on first use, once for all numbers of rows and candidates."""
    return triton.jit(function, do_not_specialize=["n", "candidates"])


@_kernel
def _flip_cost(
    kept: tl.tensor, w: tl.tensor, c: tl.tensor, linear: tl.tensor, diagonal: tl.tensor
) -> tl.tensor:
    sign = tl.where(kept, 1.0, -1.0).to(w.dtype)
    return sign * (2 * w * c + linear) + w * w * diagonal


@_kernel
def _pack(
    inner: tl.tensor,
    weight: tl.tensor,
    hopeful: tl.tensor,
    active: tl.tensor,
    packed: tl.tensor,
    order: tl.tensor,
    count: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    length: tl.tensor,
    rows: tl.constexpr,
    step: tl.constexpr,
    size: tl.constexpr,
) -> None:
    """Per block of rows: the indices that any row wants, and [cost; weight] of all rows there."""
    block = tl.program_id(0)
    i = tl.arange(0, size)
    live = i < d
    wanted = tl.zeros([size], tl.int32)
    for r in range(rows):
        slot = block * rows + r
        there = live & (slot < n)
        row = tl.load(active + slot, mask=slot < n, other=0)
        wanted |= tl.load(hopeful + row * d + i, mask=there, other=0).to(tl.int32)
    total = tl.sum(wanted, 0)
    chosen = wanted != 0
    place = block.to(tl.int64) * length + tl.cumsum(wanted, 0) - 1
    tl.store(order + place, i, mask=chosen)
    for r in range(rows):
        slot = block * rows + r
        there = chosen & (slot < n)
        row = tl.load(active + slot, mask=slot < n, other=0)
        cost = tl.load(inner + row * d + i, mask=there, other=float("inf"))
        w = tl.load(weight + row * d + i, mask=there, other=0.0)
        tl.store(packed + place * (2 * rows) + r, cost, mask=chosen)
        tl.store(packed + place * (2 * rows) + rows + r, w, mask=chosen)
    end = block.to(tl.int64) * length + total + tl.arange(0, step)
    tl.store(order + end, tl.zeros([step], tl.int32))
    each = end[:, None] * (2 * rows) + tl.arange(0, rows)[None, :]
    never = tl.full([step, rows], float("inf"), packed.dtype.element_ty)
    tl.store(packed + each, never)
    tl.store(packed + each + rows, tl.zeros([step, rows], packed.dtype.element_ty))
    tl.store(count + block, total)


@_kernel
def _scan_rows(
    gram: tl.tensor,
    weight: tl.tensor,
    outer: tl.tensor,
    best: tl.tensor,
    active: tl.tensor,
    packed: tl.tensor,
    order: tl.tensor,
    count: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    length: tl.tensor,
    rows: tl.constexpr,
    step: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """``best_j = cost_j + min_i (cost_i - 2 w_i w_j G_ij)`` for a block of rows, a tile of j."""
    block = tl.program_id(0)
    r = tl.arange(0, rows)
    slot = block * rows + r
    row = tl.load(active + slot, mask=slot < n, other=0)
    j = tl.program_id(1) * tile + tl.arange(0, tile)
    live = j < d
    at = row[:, None] * d + j[None, :]
    there = (slot < n)[:, None] & live[None, :]
    two_w = 2 * tl.load(weight + at, mask=there, other=0.0)
    least = tl.full([rows, tile], float("inf"), two_w.dtype)
    start = block.to(tl.int64) * length
    for low in range(0, tl.load(count + block), step):
        for k in tl.static_range(step):
            place = start + low + k
            i = tl.load(order + place).to(tl.int64)
            g = tl.load(gram + i * d + j, mask=live, other=0.0)
            cost = tl.load(packed + place * (2 * rows) + r)
            w = tl.load(packed + place * (2 * rows) + rows + r)
            least = tl.minimum(least, cost[:, None] - w[:, None] * (two_w * g[None, :]))
    own = tl.load(outer + at, mask=there, other=0.0)
    tl.store(best + slot.to(tl.int64)[:, None] * d + j[None, :], least + own, mask=there)


@_kernel
def _scan_blocks(
    gram: tl.tensor,
    weight: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    best: tl.tensor,
    active: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """The same for one row whose pairs stay inside blocks of ``width``."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(active + slot)
    j = tl.program_id(1) * tile + tl.arange(0, tile)
    live = j < d
    low = j // width * width
    two_w = 2 * tl.load(weight + row * d + j, mask=live, other=0.0)
    least = tl.full([tile], float("inf"), two_w.dtype)
    for k in range(width):
        i = low + k
        g = tl.load(gram + j.to(tl.int64) * d + i, mask=live, other=0.0)
        cost = tl.load(inner + row * d + i, mask=live, other=float("inf"))
        w = tl.load(weight + row * d + i, mask=live, other=0.0)
        least = tl.minimum(least, cost - w * (two_w * g))
    own = tl.load(outer + row * d + j, mask=live, other=0.0)
    tl.store(best + slot * d + j, least + own, mask=live)


@_kernel
def _recheck(
    gram: tl.tensor,
    diagonal: tl.tensor,
    weight: tl.tensor,
    linear: tl.tensor,
    correlation: tl.tensor,
    keep: tl.tensor,
    best: tl.tensor,
    active: tl.tensor,
    slots: tl.tensor,
    indices: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    tile: tl.constexpr,
) -> None:
    """The best value of one vector index j of one row, in float64."""
    slot = tl.load(slots + tl.program_id(0))
    j = tl.load(indices + tl.program_id(0))
    at = tl.load(active + slot) * d
    w_j = tl.load(weight + at + j)
    kept_j = tl.load(keep + at + j) != 0
    own = _flip_cost(
        kept_j,
        w_j,
        tl.load(correlation + at + j),
        tl.load(linear + at + j),
        tl.load(diagonal + j),
    )
    low = j // width * width
    least = tl.full([tile], float("inf"), tl.float64)
    for start in range(0, width, tile):
        place = start + tl.arange(0, tile)
        i = low + place
        live = place < width
        kept = tl.load(keep + at + i, mask=live, other=0) != 0
        w = tl.load(weight + at + i, mask=live, other=0.0)
        c = tl.load(correlation + at + i, mask=live, other=0.0)
        cost = _flip_cost(
            kept,
            w,
            c,
            tl.load(linear + at + i, mask=live, other=0.0),
            tl.load(diagonal + i, mask=live, other=0.0),
        )
        g = tl.load(gram + j * d + i, mask=live, other=0.0)
        value = cost - w * (2 * w_j * g)
        least = tl.minimum(least, tl.where(live & (kept != kept_j), value, float("inf")))
    tl.store(best + slot * d + j, tl.min(least, 0) + own)


@_kernel
def _swap(
    best: tl.tensor,
    active: tl.tensor,
    weight: tl.tensor,
    linear: tl.tensor,
    gram: tl.tensor,
    scan_gram: tl.tensor,
    diagonal: tl.tensor,
    rho: tl.tensor,
    noise: tl.tensor,
    loss: tl.tensor,
    scalar_kept: tl.tensor,
    keep: tl.tensor,
    correlation: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    hopeful: tl.tensor,
    applied: tl.tensor,
    least: tl.tensor,
    tolerance: tl.tensor,
    d: tl.tensor,
    width: tl.tensor,
    candidates: tl.tensor,
    size: tl.constexpr,
) -> None:
    """Apply up to ``candidates`` pairs to one row, best first, and prepare its next scan."""
    slot = tl.program_id(0)
    row = tl.load(active + slot)
    at = row * d
    i = tl.arange(0, size)
    live = i < d
    never = float("inf")
    w = tl.load(weight + at + i, mask=live, other=0.0)
    c = tl.load(correlation + at + i, mask=live, other=0.0)
    kept = tl.load(keep + at + i, mask=live, other=0) != 0
    line = tl.load(linear + at + i, mask=live, other=0.0)
    square = tl.load(diagonal + i, mask=live, other=0.0)
    inner_kept = tl.load(scalar_kept + row) != 0
    value = tl.load(loss + row)
    slack = tl.load(tolerance)
    error = tl.load(noise + row)
    threshold = -(slack * tl.abs(value) + error)

    promise = tl.load(best + slot.to(tl.int64) * d + i, mask=live, other=never)
    tl.store(least + slot, tl.minimum(tl.min(promise, 0).to(tl.float64), 0.0))
    cost = _flip_cost(kept, w, c, line, square).to(promise.dtype)
    cost = tl.where(live & (kept == inner_kept), cost, never)
    w_scan = w.to(promise.dtype)
    made = 0
    for _ in range(candidates):
        if tl.min(promise, 0).to(tl.float64) < threshold:
            j = tl.argmin(promise, 0)
            promise = tl.where(i == j, never, promise)
            w_j = tl.load(weight + at + j)
            near = live & (i // width == j // width)
            g = tl.load(scan_gram + j.to(tl.int64) * d + i, mask=near, other=0.0)
            pair = cost - 2 * w_j.to(promise.dtype) * (w_scan * g)
            pair = tl.where(near, pair, never)
            s = tl.argmin(pair, 0)
            if tl.min(pair, 0) < never:
                u = tl.where(inner_kept, s, j)
                p = tl.where(inner_kept, j, s)
                w_u = tl.load(weight + at + u)
                w_p = tl.load(weight + at + p)
                c_u = tl.sum(tl.where(i == u, c, 0.0), 0)
                c_p = tl.sum(tl.where(i == p, c, 0.0), 0)
                from_u = gram + u.to(tl.int64) * d
                from_p = gram + p.to(tl.int64) * d
                delta = (
                    2 * w_u * c_u + w_u * w_u * tl.load(diagonal + u) + tl.load(linear + at + u)
                    - 2 * w_p * c_p + w_p * w_p * tl.load(diagonal + p) - tl.load(linear + at + p)
                    - 2 * w_u * w_p * tl.load(from_u + p)
                )  # fmt: skip
                if delta < threshold:
                    g_u = tl.load(from_u + i, mask=live, other=0.0)
                    g_p = tl.load(from_p + i, mask=live, other=0.0)
                    c += w_u * g_u - w_p * g_p
                    kept = (kept & (i != u)) | (i == p)
                    line = tl.load(linear + at + i, mask=live, other=0.0)
                    square = tl.load(diagonal + i, mask=live, other=0.0)
                    cost = _flip_cost(kept, w, c, line, square).to(promise.dtype)
                    cost = tl.where(live & (kept == inner_kept), cost, never)
                    value += delta
                    made += 1
    tl.store(applied + slot, made)
    tl.store(loss + row, value)
    tl.store(correlation + at + i, c, mask=live)
    tl.store(keep + at + i, kept.to(tl.uint8), mask=live)

    # The scalar indices that may have an improving partner from now on. What was needed before
    # the loop is loaded again, so that it takes no registers in between.
    line = tl.load(linear + at + i, mask=live, other=0.0)
    square = tl.load(diagonal + i, mask=live, other=0.0)
    flip = _flip_cost(kept, w, c, line, square)
    is_inner = live & (kept == inner_kept)
    is_outer = live & (kept != inner_kept)
    tl.store(inner + at + i, tl.where(is_inner, flip, never).to(w_scan.dtype), mask=live)
    tl.store(outer + at + i, tl.where(is_outer, flip, never).to(w_scan.dtype), mask=live)
    alpha = tl.abs(w) * tl.sqrt(square)
    cheapest = tl.min(tl.where(is_outer, flip, never), 0)
    longest = tl.max(tl.where(is_outer, alpha, 0.0), 0)
    reach = 2 * tl.load(rho + i, mask=live, other=0.0) * alpha * longest
    hope = is_inner & (flip + cheapest - reach < -(slack * tl.abs(value) + error))
    tl.store(hopeful + at + i, hope.to(tl.uint8), mask=live)
