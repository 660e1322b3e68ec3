"""The rows of a problem in the units that every swap kernel works in.

Notation of the search, for one row with pruned part ``q = x * w`` and ``c = G q``:
pruning the kept ``u`` and reviving the pruned ``p`` changes the loss by

    delta(u, p) = a_u + b_p - 2 w_u w_p G_up
    a_u = 2 w_u c_u + w_u^2 G_uu + l_u,     b_p = -2 w_p c_p + w_p^2 G_pp - l_p

(SparseSwaps; ``l`` is the problem's linear term). The two roles are one formula with the sign
of ``x`` in front, which is how the kernels compute them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..problem import MaskProblem

_LEAST_SHARE = 1e-280
"""Of the linear term, below which the scale of the Gram matrix would make units overflow."""


@dataclass(frozen=True)
class ScaledRows:
    """Rows whose numbers are about 1, all float64.

    A Gram matrix with mean diagonal 1, and weights with ``max |w_r| = 1``; or less in rows where
    the linear term outweighs them, and has ``max |l_r| = 1`` then. Scaling keeps float32
    evaluation of deltas clear of overflow and underflow whatever the units of the problem.

    Attributes
    ----------
    weight, linear
        ``[rows, d]``.
    gram
        ``[d, d]``.
    unit
        ``[rows]``: one unit of scaled loss in the problem's own units.
    noise
        ``[rows]``: a change of the scaled loss below this cannot be told from rounding.
    """

    weight: Tensor
    linear: Tensor
    gram: Tensor
    unit: Tensor
    noise: Tensor

    @classmethod
    def of(cls, problem: MaskProblem) -> ScaledRows:
        """Scale a problem."""
        weight, gram = problem.weight.double(), problem.gram.double()
        linear = torch.zeros_like(weight) if problem.linear is None else problem.linear
        most = linear.abs().amax(dim=1)
        gram_scale = _or_one(torch.maximum(gram.diagonal().mean(), _LEAST_SHARE * most.amax()))
        row_scale = torch.maximum(weight.abs().amax(dim=1), (most / gram_scale).sqrt())
        row_scale = _or_one(row_scale)
        unit = row_scale**2 * gram_scale
        weight = weight / row_scale[:, None]
        gram = gram / gram_scale
        linear = linear / _or_one(unit)[:, None]
        size = weight**2 @ gram.diagonal() + linear.abs().sum(dim=1)
        noise = weight.shape[1] * torch.finfo(torch.float64).eps * size
        return cls(weight, linear, gram, unit, noise)

    def take(self, index: Tensor) -> ScaledRows:
        """Some of the rows, scaled as they are."""
        return ScaledRows(
            self.weight[index], self.linear[index], self.gram, self.unit[index], self.noise[index]
        )

    def correlation(self, mask: Tensor) -> Tensor:
        """``c = G q``, float64 ``[rows, d]``."""
        return self.weight.masked_fill(mask, 0.0) @ self.gram

    def loss(self, mask: Tensor, correlation: Tensor) -> Tensor:
        """Scaled loss, from the correlation, float64 ``[rows]``."""
        return (self.weight * correlation + self.linear).masked_fill(mask, 0.0).sum(dim=1)

    def flip_cost(self, mask: Tensor, correlation: Tensor) -> Tensor:
        """``a`` where kept and ``b`` where pruned: what flipping each entry alone would cost."""
        sign = torch.where(mask, 1.0, -1.0).to(correlation.dtype)
        gradient = sign * (2 * self.weight * correlation + self.linear)
        return gradient + self.weight**2 * self.gram.diagonal()


@dataclass
class RowResult:
    """What a kernel did to some rows.

    Attributes
    ----------
    swaps
        Applied, in total.
    passes
        ``[rows]`` int64.
    loss
        ``[rows]`` scaled loss afterwards, float64.
    best_left
        ``[rows]``: change of the scaled loss by the best swap still possible, from a complete
        float64 scan (0 if every swap would raise the loss); NaN where the passes ran out first.
    pairs
        How many (kept, pruned) pairs were evaluated; 0 where a kernel does not count them.
    """

    swaps: int
    passes: Tensor
    loss: Tensor
    best_left: Tensor
    pairs: int = 0


class RowKernel(Protocol):
    """Swaps inside rows, until none improves."""

    parallel_calls: int
    """How many calls may run at once, in threads."""

    def rows_per_call(self, rows: int) -> int:
        """How many of ``rows`` rows to hand over at a time."""

    def improve(self, index: Tensor, mask: Tensor, max_passes: int) -> RowResult:
        """Improve ``mask`` (bool ``[len(index), d]``) of the rows ``index``, in place."""


def largest_correlation(gram: Tensor) -> Tensor:
    """``max_{i != j} |G_ij| / sqrt(G_ii G_jj)`` for each j, rounded up a little; float ``[d]``."""
    scale = torch.where(gram.diagonal() > 0, gram.diagonal().rsqrt(), 0.0)
    correlation = (gram * scale * scale[:, None]).abs_()
    correlation.fill_diagonal_(0.0)
    return correlation.amax(dim=0) * (1 + 1e-12)


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
