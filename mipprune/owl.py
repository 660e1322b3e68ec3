"""Outlier-weighed layerwise sparsity (OWL, arXiv:2310.05175): more outliers, more weights kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from solvers import InvalidInput, removed_count

from .budget import Keeps, Scope, removed_by, rules_of, shape_of, uniform_pattern
from .dense_walk import DenseWalk
from .rules import Rules

THRESHOLD = 5.0
"""The paper's M."""


@dataclass(frozen=True)
class BlockOutliers:
    """A block's share of outliers.

    Attributes
    ----------
    shapes
        ``(rows, inputs)`` of its layers, by full name.
    ratio
        Share of its weights whose ``|w| ‖x‖`` is larger than M times the block's mean.
    """

    shapes: dict[str, tuple[int, int]]
    ratio: float


@torch.no_grad()
def outlier_ratios(walk: DenseWalk, threshold: float = THRESHOLD) -> list[BlockOutliers]:
    """Every block's share of outliers on dense inputs.

    An outlier is a weight whose ``|w| ‖x‖`` is larger than ``threshold`` times the mean over all
    weights of its block that are to be pruned, as in the published code; ``‖x‖`` is the norm of
    its input over the calibration tokens.
    """
    if not threshold > 0:
        raise InvalidInput(f"Threshold {threshold} is not positive; the paper's is {THRESHOLD}.")
    scores: dict[int, list[Tensor]] = {}
    shapes: dict[int, dict[str, tuple[int, int]]] = {}
    found: list[BlockOutliers] = []

    def finish(index: int) -> None:
        score = torch.cat(scores.pop(index))
        ratio = float((score > threshold * score.mean(dtype=torch.float64)).double().mean())
        found.append(BlockOutliers(shapes[index], ratio))

    for index, layer, gram in walk:
        for earlier in [one for one in scores if one != index]:
            finish(earlier)
        norm = gram.matrix.diagonal().sqrt().float()
        scores.setdefault(index, []).append((layer.weight.float().abs() * norm).flatten())
        shapes.setdefault(index, {})[layer.name] = shape_of(layer)
    for last in list(scores):
        finish(last)
    return found


def owl(
    outliers: Sequence[BlockOutliers],
    sparsity: float,
    spread: float = 0.08,
    *,
    scope: Scope = "row",
    ignore: tuple[str, ...] = (),
) -> Rules:
    """Rules that keep more weights of blocks with more outliers.

    Ratios are stretched to a width of ``2 * spread`` and moved so that the kept shares have the
    mean ``1 - sparsity``. The published code rounds down per row; here all sparsities then move
    together by the least amount at which as many weights are removed as by uniform sparsity, which
    makes up for the rounding and for blocks of unequal size.

    Parameters
    ----------
    outliers
        Of all blocks, from `outlier_ratios`.
    sparsity
        Fraction of their weights to remove.
    spread
        The paper's λ.
    scope, ignore
        Of the rules that are given back.

    Raises
    ------
    InvalidInput
        If the spread is negative.
    """
    if not spread >= 0:
        raise InvalidInput(f"Spread {spread} is negative; the paper's is 0.08.")
    uniform = uniform_pattern(sparsity, scope)
    ratios = np.array([block.ratio for block in outliers])
    width = float(np.ptp(ratios))
    kept = (ratios - ratios.min()) / width * 2 * spread if width else np.zeros(len(ratios))
    wanted = 1 - (kept - kept.mean() + 1 - sparsity)
    target = removed_by(uniform, [shape for block in outliers for shape in block.shapes.values()])

    def keeps(shift: float) -> Keeps:
        return {
            name: (shape[1] - removed_count(shape[1], min(max(share + shift, 0.0), 1.0)), shape)
            for block, share in zip(outliers, wanted, strict=True)
            for name, shape in block.shapes.items()
        }

    few, enough = -1.0, 1.0  # of the least shift, found by bisection to the last bit
    while few < (middle := (few + enough) / 2) < enough:
        removed = sum(rows * (d - keep) for keep, (rows, d) in keeps(middle).values())
        few, enough = (few, middle) if removed >= target else (middle, enough)
    return rules_of(keeps(enough), uniform, ignore)
