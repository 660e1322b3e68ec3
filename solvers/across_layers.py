"""Structured pruning across layers: how many groups each layer loses, the sum being given.

Layers compete for what is left: by scores that compare over layers (`flap_standardised`,
`lowest`), or by what each number of groups costs (`cheapest_counts`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arrays import ArrayLike
from .errors import InvalidInput
from .knapsack import choose
from .options import finite_number, whole_number
from .structured import flap, group_of_each


def flap_standardised(
    weight: ArrayLike, gram: ArrayLike, mean: ArrayLike, groups: int | ArrayLike = 1
) -> Tensor:
    """FLAP's saliency of every group as it is compared over layers, float64 ``[K]``.

    The saliency of every input (its square, where groups have several inputs) in standard
    deviations from the layer's mean; of a group, the mean over its inputs. So An et al. (AAAI 2024,
    arXiv:2312.11983) compare all layers and modules ("AL-AM" in their code).

    Parameters
    ----------
    weight, gram, mean, groups
        As for `solvers.structured.flap`; all groups of one size.

    Raises
    ------
    InvalidInput
        If the layer is not a valid one, or groups differ in size.
    """
    score = flap(weight, gram, mean)
    group = group_of_each(groups, len(score)).to(score.device)
    sizes = group.bincount()
    if not bool((sizes == sizes[0]).all()):
        raise InvalidInput("Groups that are compared over layers must be of one size.")
    score = score if int(sizes[0]) == 1 else score.square()
    spread = score.std()
    standard = (score - score.mean()) / spread if spread > 0 else torch.zeros_like(score)
    summed = score.new_zeros(len(sizes)).index_add_(0, group, standard)
    return summed / sizes


def lowest(
    scores: Sequence[Tensor], removed: float, sizes: Sequence[float] | None = None
) -> list[Tensor]:
    """Masks without the groups of the lowest scores of all layers, bool ``[1, K]`` each.

    They go in the order of their scores, until what went is as near as can be to what should.
    (FLAP's code then removes one more, by a strict comparison with the last score.)

    Parameters
    ----------
    scores
        Of each layer's groups.
    removed
        Summed size of the groups to remove.
    sizes
        Of a group of each layer; None for 1.

    Raises
    ------
    InvalidInput
        If a score is NaN, or there are not as many sizes as layers.
    """
    removed = finite_number(removed, "removed")
    if sizes is not None and len(sizes) != len(scores):
        raise InvalidInput(f"There are {len(sizes)} sizes for {len(scores)} layers; give one each.")
    if not scores or any(bool(torch.isnan(one).any()) for one in scores):
        raise InvalidInput("Scores must be numbers, of one layer at least.")
    size = torch.cat(
        [
            torch.full((len(one),), float(each), dtype=torch.float64)
            for one, each in zip(scores, sizes or [1.0] * len(scores), strict=True)
        ]
    )
    order = torch.cat([one.double().cpu() for one in scores]).argsort(stable=True)
    gone = torch.cat([size.new_zeros(1), size[order].cumsum(0)])
    kept = torch.ones(len(order), dtype=torch.bool)
    kept[order[: int((gone - removed).abs().argmin())]] = False
    return [one[None] for one in torch.split(kept, [len(one) for one in scores])]


def cheapest_counts(curves: Sequence[Tensor], removed: int) -> list[int]:
    """Groups to keep in each layer so that so many go in all, at the least summed cost.

    A multiple-choice knapsack over the curves, solved exactly; every layer keeps one group.

    Parameters
    ----------
    curves
        Of each layer ``[K + 1]``: the cost with k groups left, as from
        `solvers.structured.elimination_curve`, in a unit that compares over layers.
    removed
        How many groups go.

    Raises
    ------
    InvalidInput
        If there are not so many.
    """
    removed = whole_number(removed, "removed")
    most = sum(len(one) - 2 for one in curves)
    if not 0 <= removed <= most:
        raise InvalidInput(f"Of these layers 0 to {most} groups can go, not {removed}.")
    costs = [one.double().cpu().flip(0)[:-1].tolist() for one in curves]
    return [
        len(one) - index
        for one, index in zip(
            costs, choose(costs, [range(len(one)) for one in costs], removed), strict=True
        )
    ]
