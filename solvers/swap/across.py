"""Swaps between rows, for budgets that rows share.

There is no cross term between different rows, so exchanging a kept weight of one row for a
pruned weight of another changes the loss by ``a_u + b_p`` alone. Each pass lets every row
offer its cheapest prune or its cheapest revival and pairs the offers in order of cost; all
pairs touch different rows, so their changes add up exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import ScaledRows


@dataclass(frozen=True)
class AcrossResult:
    """Swaps and passes made, and the change by the best swap left in the problem's units.

    ``best_left`` is 0 if every swap raises the loss, None if the passes ran out first.
    """

    swaps: int
    passes: int
    best_left: float | None


class AcrossRows:
    """The search between rows. Losses are compared in the problem's own units.

    Parameters
    ----------
    rows
        The problem.
    tolerance
        A swap improves if it lowers the loss by more than this share of the two rows' losses.
    """

    def __init__(self, rows: ScaledRows, tolerance: float) -> None:
        self._rows = rows
        self._tolerance = tolerance

    def improve(self, mask: Tensor, max_passes: int) -> AcrossResult:
        """Improve ``mask`` (bool ``[rows, d]``) in place."""
        rows = self._rows
        correlation = rows.correlation(mask)
        flip = rows.flip_cost(mask, correlation) * rows.unit[:, None]
        slack = self._tolerance * rows.loss(mask, correlation).abs() + rows.noise
        slack *= rows.unit
        swaps = 0
        for done in range(max_passes):
            prune_cost, prune_at = flip.where(mask, torch.inf).min(dim=1)
            revive_cost, revive_at = flip.where(~mask, torch.inf).min(dim=1)
            pruner, reviver = _pair_rows(prune_cost, revive_cost)
            if len(pruner) == 0:
                return AcrossResult(swaps, done + 1, 0.0)
            change = prune_cost[pruner] + revive_cost[reviver]
            good = change < -(slack[pruner] + slack[reviver])
            if not bool(good.any()):
                return AcrossResult(swaps, done + 1, min(0.0, float(change[0])))
            pruner, reviver = pruner[good], reviver[good]
            u, p = prune_at[pruner], revive_at[reviver]
            mask[pruner, u] = False
            mask[reviver, p] = True
            correlation[pruner] += rows.weight[pruner, u, None] * rows.gram[u]
            correlation[reviver] -= rows.weight[reviver, p, None] * rows.gram[p]
            touched = torch.cat([pruner, reviver])
            part = rows.take(touched)
            cost = part.flip_cost(mask[touched], correlation[touched])
            flip[touched] = cost * part.unit[:, None]
            swaps += len(pruner)
        return AcrossResult(swaps, max_passes, None)


def _pair_rows(prune_cost: Tensor, revive_cost: Tensor) -> tuple[Tensor, Tensor]:
    """Disjoint (pruning row, reviving row) pairs, the globally best pair first."""
    if len(prune_cost) < 2:
        empty = prune_cost.new_empty(0, dtype=torch.long)
        return empty, empty
    by_prune, by_revive = prune_cost.argsort(stable=True), revive_cost.argsort(stable=True)
    first, second = _best_pair(prune_cost, revive_cost, by_prune, by_revive)
    rank = torch.arange(len(prune_cost), device=prune_cost.device)
    prune_rank, revive_rank = torch.empty_like(rank), torch.empty_like(rank)
    prune_rank[by_prune], revive_rank[by_revive] = rank, rank
    prune_rank[first], revive_rank[second] = -1, -1
    prunes = prune_rank < revive_rank
    prunes[first], prunes[second] = True, False
    pruner = prune_rank.argsort(stable=True)
    reviver = revive_rank.argsort(stable=True)
    pruner, reviver = pruner[prunes[pruner]], reviver[~prunes[reviver]]
    n = min(len(pruner), len(reviver))
    return pruner[:n], reviver[:n]


def _best_pair(
    prune_cost: Tensor, revive_cost: Tensor, by_prune: Tensor, by_revive: Tensor
) -> tuple[Tensor, Tensor]:
    """Two different rows with the least sum of costs."""
    if by_prune[0] != by_revive[0]:
        return by_prune[0], by_revive[0]
    keep_prune = prune_cost[by_prune[0]] + revive_cost[by_revive[1]]
    keep_revive = prune_cost[by_prune[1]] + revive_cost[by_revive[0]]
    if keep_prune <= keep_revive:
        return by_prune[0], by_revive[1]
    return by_prune[1], by_revive[0]
