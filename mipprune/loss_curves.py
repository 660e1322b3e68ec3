"""What every layer loses at each of several sparsities, measured in one pass over the dense model.

How losses of different layers compare decides an allocation. That comparison, the default, is what
a layer's loss does to the model: the KL divergence of its next-token distribution with this layer
alone pruned, per unit of the layer's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from solvers import InvalidInput, MaskProblem, PerRow, get_solver, solve
from solvers.registry import DEFAULT_START

from .budget import shape_of
from .capture import forward
from .dense_walk import DenseWalk
from .gram import Gram
from .models import PrunableLayer
from .placement import Placement

Criterion = Literal["loss", "relative", "divergence"]

Prune = Callable[[PrunableLayer, Gram, PerRow], Tensor]
"""A layer's new weight, zero where it is pruned."""

_PROBABILITIES = 1 << 28
"""Of the dense model, held in float32 for comparison."""


@dataclass(frozen=True)
class Option:
    """One sparsity that a layer may have.

    Attributes
    ----------
    keep
        Weights kept per row (per layer: on average).
    removed
        Weights removed in the whole layer.
    loss
        Squared change of the outputs per token, float64.
    cost
        What it counts in an allocation.
    """

    keep: int
    removed: int
    loss: float
    cost: float


@dataclass(frozen=True)
class LossCurve:
    """What a layer loses at each of several sparsities, sparsest last.

    Attributes
    ----------
    layer, rows, inputs
        The layer's full name, and its shape.
    energy
        Mean square of its dense output, summed over rows.
    options
        At least one, ordered by weights removed.
    divergence
        KL(dense ‖ pruned) in nats per token with only this layer pruned, by weights kept per row;
        empty unless the costs were weighted by it.
    """

    layer: str
    rows: int
    inputs: int
    energy: float
    options: tuple[Option, ...]
    divergence: dict[int, float]


def masked_by(solver: str) -> Prune:
    """Layers pruned by a solver's masks, weights as they are."""

    def prune(layer: PrunableLayer, gram: Gram, pattern: PerRow) -> Tensor:
        mask = _mask(MaskProblem(layer.weight, gram.matrix, pattern, copy=False), solver)
        return layer.weight.masked_fill(~mask, 0.0)

    return prune


@torch.no_grad()
def loss_curves(
    walk: DenseWalk,
    sparsity: float,
    grid: Sequence[float],
    *,
    criterion: Criterion = "divergence",
    solver: str = "wanda",
    anchors: Sequence[float] | None = None,
    prune: Prune | None = None,
    probe: int = 8,
) -> list[LossCurve]:
    """Loss against sparsity of every layer, all on inputs of the dense model.

    Parameters
    ----------
    walk
        The dense model.
    sparsity
        Uniform sparsity that will be compared with; it is an option of every layer, and the only
        one of a layer that saw no calibration token.
    grid
        Sparsities to measure.
    criterion
        What an option costs: "loss" as it is; "relative" to the layer's output energy; or
        "divergence": the loss times the KL divergence per unit of loss, measured at the anchors
        with this layer alone pruned and interpolated linearly in between.
    solver
        Of the curve's masks; a cheap one will do, for between anchors only its shape counts.
    anchors
        Sparsities at which the divergence is measured; by default ``sparsity``.
    prune
        How the layer is pruned for it; by default by swaps from Wanda's mask.
    probe
        Calibration windows that divergences are measured on. One anchor takes one forward of them
        per layer.

    Raises
    ------
    InvalidInput
        If a sparsity is outside (0, 1), or a choice is unknown.
    """
    if criterion not in get_args(Criterion):
        raise InvalidInput(f"Criterion '{criterion}' is none of {', '.join(get_args(Criterion))}.")
    if probe < 1:
        raise InvalidInput(f"probe={probe} is below 1; it is a number of windows.")
    anchors = ([sparsity] if anchors is None else anchors) if criterion == "divergence" else []
    prune = prune or masked_by("swap")
    uniform = PerRow(sparsity=sparsity)
    patterns = [PerRow(sparsity=share) for share in {*grid, *anchors, sparsity}]
    divergence = Divergence(walk.placement, walk.windows.tokens[:probe], walk.batch_size)
    curves = []
    for _, layer, gram in walk:
        rows, inputs = shape = shape_of(layer)
        keeps = {pattern.kept_per_cell(shape) for pattern in patterns}
        anchored = {PerRow(sparsity=share).kept_per_cell(shape) for share in anchors}
        if gram.tokens == 0:
            keeps, anchored = {uniform.kept_per_cell(shape)}, set()
        losses, measured = {}, {}
        for keep in sorted(keeps):
            problem = MaskProblem(layer.weight, gram.matrix, PerRow(keep=keep), copy=False)
            losses[keep] = float(problem.objective(_mask(problem, solver)).sum())
            if keep in anchored:
                measured[keep] = divergence.of(layer, prune(layer, gram, PerRow(keep=keep)))
        energy = float(
            MaskProblem(layer.weight, gram.matrix, uniform, copy=False).output_energy().sum()
        )
        scale = _scale(criterion, losses, energy, measured)
        curve = tuple(
            Option(keep, rows * (inputs - keep), losses[keep], losses[keep] * scale[keep])
            for keep in sorted(keeps, reverse=True)
            if keep in scale
        )
        curves.append(LossCurve(layer.name, rows, inputs, energy, curve, measured))
    return curves


def _mask(problem: MaskProblem, solver: str) -> Tensor:
    start = DEFAULT_START if get_solver(solver).needs_start else None
    return solve(problem, solver, start=start).mask


def _scale(
    criterion: Criterion, losses: dict[int, float], energy: float, measured: dict[int, float]
) -> dict[int, float]:
    """Cost per unit of loss, by weights kept; none where it is unknown and there is a loss."""
    if criterion == "loss":
        return dict.fromkeys(losses, 1.0)
    if criterion == "relative":
        return dict.fromkeys(losses, 1 / energy if energy > 0 else 0.0)
    known = sorted(keep for keep in measured if losses[keep] > 0)
    if not known:
        return {keep: 0.0 for keep, loss in losses.items() if loss == 0}
    weights = [measured[keep] / losses[keep] for keep in known]
    return {keep: float(np.interp(keep, known, weights)) for keep in losses}


class Divergence:
    """KL(dense ‖ pruned) of the next-token distribution with a few layers pruned alone.

    Parameters
    ----------
    placement
        Holds the model, dense until the first question.
    tokens
        int64 ``[windows, length]``.
    batch_size
        Windows per forward.
    """

    def __init__(self, placement: Placement, tokens: Tensor, batch_size: int) -> None:
        self._placement = placement
        self._batches = torch.split(tokens, batch_size)
        self._dense: list[Tensor] = []

    def of(self, layer: PrunableLayer, weight: Tensor) -> float:
        """In nats per token, with that weight; the layer is as before afterwards."""
        return self.of_all([(layer, weight)])

    def of_all(self, weights: Sequence[tuple[PrunableLayer, Tensor]]) -> float:
        """The same with several layers' weights at once."""
        if not self._dense:
            self._dense = [self._log_probabilities(batch) for batch in self._batches]
        before = [(layer, layer.weight.clone()) for layer, _ in weights]
        total = tokens = 0.0
        try:
            for layer, weight in weights:
                layer.weight.copy_(weight)
            for batch, p in zip(self._batches, self._dense, strict=True):
                q = self._log_probabilities(batch)
                total += float((p.exp() * (p - q)).sum(dim=-1).double().sum())
                tokens += len(p)
        finally:
            for layer, weight in before:
                layer.weight.copy_(weight)
        return max(total / tokens, 0.0)  # not below zero by rounding

    def _log_probabilities(self, batch: Tensor) -> Tensor:
        with self._placement.forward():
            logits = forward(self._placement.model, batch)[:, :-1].flatten(0, 1)
        held = sum(one.numel() for one in self._batches) * logits.shape[-1]
        return log_softmax(logits[:: -(-held // _PROBABILITIES)].float(), dim=-1)
