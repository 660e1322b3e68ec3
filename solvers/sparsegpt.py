"""SparseGPT: one sweep over the columns that prunes, and makes up for it in the columns to come.

With ``H = G + damping`` and ``U`` the upper Cholesky factor of ``H^-1``, removing the weight of
column ``j`` costs ``w_j^2 / U_jj^2`` when all columns after ``j`` may still change, and is made up
for by ``w_k -= w_j U_jk / U_jj`` for ``k > j`` (Frantar & Alistarh, arXiv 2301.00774, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidInput
from .options import checked_options, option
from .pattern import NM, CellPattern, PerLayer, PerRow
from .registry import register
from .solution import Status
from .solver import Outcome, Search, Solver

_Choice = Callable[[int, int, Tensor, Tensor], Tensor]
"""From columns ``begin..end-1``, their current weights and ``diag(U)`` there: what to keep."""


@dataclass(frozen=True)
class SparseGPTUpdate:
    """SparseGPT's weights for a given mask: each pruned column is made up for by those after it.

    For the mask of the solver `SparseGPT` with the same damping this is SparseGPT, mask and
    weights. `LeastSquares` is exact on the support and never worse.

    Parameters
    ----------
    damping
        In units of the mean diagonal of the Gram matrix.
    """

    damping: float = option(1e-2, least=0)

    def __post_init__(self) -> None:
        checked_options(self, type(self).__name__)

    def __call__(self, weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
        """Updated weights, ``[rows, d]`` in the weight's dtype; computed in float64."""

        def given(begin: int, end: int, _: Tensor, __: Tensor) -> Tensor:
            return mask[:, begin:end]

        updated, _ = _sweep(weight, gram, self.damping, 128, 128, given)
        return updated.to(weight.dtype)


@register
@dataclass(frozen=True)
class SparseGPT(Solver):
    """The mask of SparseGPT (Frantar & Alistarh, arXiv 2301.00774).

    Chosen block by block from weights that already make up for what earlier blocks lost, so that
    it belongs to `SparseGPTUpdate` or `LeastSquares`; its loss without a weight update is higher.
    As published, a block of `PerLayer` keeps its share over all rows together, and N:M groups
    are chosen one by one; `PerRow` gives every row the same share of every block. A linear term is
    ignored.

    Parameters
    ----------
    damping
        In units of the mean diagonal of the Gram matrix; the paper's is 0.01.
    block
        Columns whose mask is chosen together; the paper's is 128.
    """

    damping: float = option(1e-2, least=0)
    block: int = option(128, least=1)

    name = "sparsegpt"
    summary = "SparseGPT's mask, meant for a weight update after it"
    patterns = (PerRow, NM, PerLayer)
    ignores_linear = True

    def _search(self, search: Search) -> Outcome:
        problem = search.problem
        pattern = problem.pattern
        assert isinstance(pattern, CellPattern)
        width = self.block
        if isinstance(pattern, NM):
            step = pattern.group
            width = max(step, width - width % step)
            choose = _in_groups(pattern)
        else:
            step = width
            choose = _by_share(pattern, problem.shape)
        _, mask = _sweep(problem.weight, problem.gram, self.damping, width, step, choose)
        return Outcome(mask, Status.FEASIBLE)


def _by_share(pattern: CellPattern, shape: tuple[int, int]) -> _Choice:
    """Each block keeps its share of the count, rounded so that all blocks together are exact."""
    d = shape[1]
    kept = pattern.kept_per_cell(shape)

    def choose(begin: int, end: int, weight: Tensor, pivot: Tensor) -> Tensor:
        count = kept * end // d - kept * begin // d
        score = (weight / pivot) ** 2
        cells = score.reshape(1, -1) if pattern.coupled else score
        best = cells.topk(count, dim=1).indices
        mask = torch.zeros(cells.shape, dtype=torch.bool, device=weight.device)
        return mask.scatter_(1, best, True).view(weight.shape)

    return choose


def _in_groups(pattern: NM) -> _Choice:
    def choose(_: int, __: int, weight: Tensor, pivot: Tensor) -> Tensor:
        return pattern.unchecked_lmo(-((weight / pivot) ** 2))

    return choose


def _sweep(
    weight: Tensor, gram: Tensor, damping: float, width: int, step: int, choose: _Choice
) -> tuple[Tensor, Tensor]:
    """Updated weights (float64) and mask; masks are chosen ``step`` columns at a time.

    Updates of columns beyond a block of ``width`` are made once for the whole block.
    """
    w = weight.double().clone()
    d = w.shape[1]
    H = gram.double().clone()
    dead = H.diagonal() == 0
    H.diagonal().add_(damping * H.diagonal().mean())
    H.diagonal()[dead] = 1.0
    w[:, dead] = 0.0
    U = _inverse_factor(H)
    mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
    for begin in range(0, d, width):
        end = min(begin + width, d)
        removed = torch.zeros_like(w[:, begin:end])
        for j in range(begin, end):
            if (j - begin) % step == 0:
                to = min(j + step, end)
                mask[:, j:to] = choose(j, to, w[:, j:to], U.diagonal()[j:to])
            error = w[:, j].masked_fill(mask[:, j], 0.0) / U[j, j]
            w[:, j:end] -= error[:, None] * U[j, j:end]
            w[:, j].masked_fill_(~mask[:, j], 0.0)
            removed[:, j - begin] = error
        w[:, end:] -= removed @ U[begin:end, end:]
    return w, mask


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info) != 0:
        raise InvalidInput("SparseGPT's matrix is singular; give more damping, such as 0.01.")
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper
