"""Swap kernel for the CPU: fused scans over tiles of the Gram matrix, no [rows, d, d] in memory.

A *pass* over a row finds, for every index of the larger side (kept or pruned), its best
partner on the smaller side, then applies up to ``candidates`` of these pairs, best first, each
re-evaluated in float64 against the current ``c``, which then gives the next its best partner.
Scanning may be in float32; every applied swap is an improvement in float64, and a row is only
finished by a complete float64 scan that finds none.

The smaller side is the loop's *scalar* side, the larger its vector side. A scan goes through the
Gram matrix by tiles that stay in the first-level cache while all rows of a call use them: for
each row, the tile's scalar indices against one vector of columns. Scalar indices whose best
conceivable pair cannot improve are skipped, which never changes the answer: with
``alpha_j = |w_j| sqrt(G_jj)`` and ``rho_j`` the largest absolute correlation of input j with
any other, ``|2 w_i w_j G_ij| <= 2 alpha_i alpha_j rho_i``.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .passes import BIG, LANES, TILE, Block, Grams, Scratch, improve
from .rows import RowResult, ScaledRows, largest_correlation

_ROWS_PER_CALL = 192
"""Rows that share each tile of the Gram matrix, at most."""


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
        self._width, self._candidates, self._tolerance = width, candidates, tolerance
        gram, diagonal = rows.gram.contiguous(), rows.gram.diagonal().contiguous()
        shared = (diagonal.numpy(), diagonal.sqrt().numpy(), largest_correlation(gram).numpy())
        scans = [_vectors(gram, torch.float64)]
        if scan_dtype == torch.float32:
            scans.insert(0, _vectors(gram, torch.float32))
        self._grams = [Grams(gram.numpy(), scan.numpy(), *shared) for scan in scans]
        self._local = threading.local()
        self.parallel_calls = torch.get_num_threads()

    def rows_per_call(self, rows: int) -> int:
        """So many that all threads have several calls to take."""
        return max(1, min(_ROWS_PER_CALL, -(-rows // (4 * self.parallel_calls))))

    def improve(self, index: Tensor, mask: Tensor, max_passes: int) -> RowResult:
        """Improve ``mask`` in place; see `RowKernel`."""
        rows = self._rows.take(index)
        passes, pairs = torch.zeros(2, len(index), dtype=torch.long)
        loss, best_left = torch.empty(2, len(index), dtype=torch.float64)
        parts = (rows.weight, rows.linear, mask, rows.noise, passes, pairs, loss, best_left)
        block = Block(*(part.numpy() for part in parts))
        swaps = 0
        for grams in self._grams:
            scratch = self._scratch(len(index), grams)
            swaps += improve(
                block, grams, scratch, self._width, self._candidates, max_passes, self._tolerance
            )
        return RowResult(swaps, passes, loss, best_left, int(pairs.sum()))

    def _scratch(self, rows: int, grams: Grams) -> Scratch:
        """The thread's own, made anew only for more rows."""
        held: dict[str, Scratch] = self._local.__dict__
        kind = grams.scan.dtype.name
        if kind not in held or len(held[kind].c) < rows:
            held[kind] = _scratch(rows, grams)
        return held[kind]


def _vectors(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows cut into vectors, ``[d_padded / LANES, d, LANES]``: see `Grams`."""
    padded = torch.nn.functional.pad(gram, (0, -len(gram) % LANES))
    return padded.view(len(gram), -1, LANES).transpose(0, 1).to(dtype).contiguous()


def _scratch(rows: int, grams: Grams) -> Scratch:
    """Working arrays for so many rows, in the dtype of ``grams.scan``."""
    vectors, d, lanes = grams.scan.shape
    dtype = torch.from_numpy(grams.scan).dtype
    padded, tiles = vectors * lanes, -(-d // TILE)
    c = torch.zeros(rows, d, dtype=torch.float64)
    w, cost = torch.zeros(2, rows, padded, dtype=dtype)
    twice, best = torch.zeros(2, vectors, rows, lanes, dtype=dtype)
    scalar = torch.empty(tiles, rows, TILE, dtype=torch.int32)
    terms = torch.empty(tiles, rows, 2 * TILE, dtype=dtype)
    listed = torch.empty(tiles, rows, dtype=torch.long)
    inner, outer, lower, value = torch.full((4, padded), BIG, dtype=dtype)
    alpha = torch.zeros(padded, dtype=dtype)
    parts = (
        c, w, cost, twice, best, scalar, terms, listed, inner, outer, alpha, lower, value
    )  # fmt: skip
    return Scratch(*(part.numpy() for part in parts))
