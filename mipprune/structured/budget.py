"""How many neurons and how many KV groups go, when only the model's parameters or time are given.

Every block has the same counts, so there are two numbers to choose. What a count saves is counted
(`Parameters`) or measured (`mipprune.structured.latency`). What it costs is read off
one elimination per block (`solvers.structured.elimination_curve`), which gives the loss at every
count at once; losses of neurons and of attention groups are made comparable by what they do to the
model: the KL divergence of the next-token distribution with one kind removed from all blocks, per
unit of their summed loss. The cheapest pair of counts within the budget is a multiple-choice
knapsack, solved exactly (`solvers.knapsack`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from solvers import InvalidInput
from solvers.knapsack import choose
from solvers.structured import elimination_curve, expand, refitted

from ..loss_curves import Divergence
from ..models import PrunableLayer
from ..placement import Placement
from .coupling import (
    Kind,
    Options,
    find_structure,
    group_count,
    smaller_config,
)
from .latency import Latency, time_savings
from .savings import Parameters, parameters_each

if TYPE_CHECKING:
    from ..walk import BlockWalk

STEPS = 64
"""Numbers of neurons that are considered, at most."""


@dataclass(frozen=True)
class Curve:
    """What each count of one kind costs.

    Attributes
    ----------
    kind
        Neurons or KV groups.
    parameters
        Of one group, in all blocks.
    divergence
        KL(dense ‖ smaller) in nats per token, with this kind alone removed down to `anchor`.
    anchor
        The count at which it was measured.
    counts
        Groups left in every block, most first.
    costs
        Of each count, in nats per token.
    """

    kind: Kind
    parameters: int
    divergence: float
    anchor: int
    counts: tuple[int, ...]
    costs: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """Counts that were chosen, and by what.

    Attributes
    ----------
    counts
        Groups to keep, of the kinds that lose some.
    curves
        What each count costs.
    measured
        See `Savings`.
    """

    counts: dict[Kind, int]
    curves: list[Curve]
    measured: dict[str, Any]


@torch.no_grad()
def counts_within(
    placement: Placement,
    budget: Parameters | Latency,
    walk: Callable[[set[str]], BlockWalk],
    probe: Tensor,
    batch_size: int,
    *,
    multiple_of: int = 1,
    damping: float = 1e-2,
    add_biases: bool = False,
) -> Decision:
    """Counts that keep a model within a budget, at the least cost.

    Parameters
    ----------
    placement
        The model; it is left as it was.
    budget
        On its parameters or its time.
    walk
        Makes a walk over the dense blocks that watches the layers named.
    probe
        int64 ``[windows, length]``, for the divergences and for a pass to time.
    batch_size
        Windows per forward of them.
    multiple_of
        Of the neurons left.
    damping
        Of the least squares.
    add_biases
        Whether the smaller model will have biases that this one lacks.

    Raises
    ------
    InvalidInput
        If neither kind can be removed, or not so many of them.
    """
    model: Any = placement.model
    options = _options(model, placement.blocks_name, multiple_of)
    savings = (
        budget.savings(model, options, add_biases)
        if isinstance(budget, Parameters)
        else time_savings(placement, probe, options, budget)
    )
    anchors = {
        kind: _anchor(one.counts, savings.amounts[kind], savings.target)
        for kind, one in options.items()
    }
    losses = {
        kind: torch.zeros(one.counts[0] + 1, dtype=torch.float64) for kind, one in options.items()
    }
    weights: dict[Kind, list[tuple[PrunableLayer, Tensor]]] = {kind: [] for kind in options}
    readers = {
        one.reader.name: one
        for of_kind in options.values()
        for block in of_kind.couplings
        for one in block
    }
    for step in walk(set(readers)):
        for one in (readers[layer.name] for layer in step.layers if layer.name in readers):
            gram, groups = step.grams.gram(one.reader).matrix, one.of_inputs()
            curve, order = elimination_curve(one.reader.weight, gram, groups, damping)
            losses[one.kind] += curve
            kept = torch.ones(1, one.count, dtype=torch.bool)
            kept[0, order[: one.count - anchors[one.kind]]] = False
            inputs = expand(kept, groups)[0].to(gram.device)
            new = refitted(one.reader.weight, gram, inputs, damping)
            weights[one.kind].append((one.reader, new.to(one.reader.weight.dtype).cpu()))
    divergence = Divergence(placement, probe, batch_size)
    curves = []
    for kind, considered in options.items():
        measured = divergence.of_all(weights[kind])
        anchor_loss = float(losses[kind][anchors[kind]])
        scale = measured / anchor_loss if anchor_loss > 0 else 0.0
        costs = tuple(scale * float(losses[kind][count]) for count in considered.counts)
        each = parameters_each(model, considered)
        curves.append(Curve(kind, each, measured, anchors[kind], considered.counts, costs))
    chosen = choose(
        [one.costs for one in curves],
        [savings.amounts[one.kind] for one in curves],
        savings.target,
    )
    counts = {one.kind: one.counts[index] for one, index in zip(curves, chosen, strict=True)}
    lost = {kind: left for kind, left in counts.items() if left < options[kind].counts[0]}
    return Decision(lost, curves, savings.measured)


def _options(model: Any, blocks_name: str, multiple_of: int) -> dict[Kind, Options]:
    """What can be removed; `InvalidInput` if nothing can."""
    options: dict[Kind, Options] = {}
    refusals = []
    for kind in get_args(Kind):
        try:
            counts = _counts(model.config, kind, multiple_of)
            structure = find_structure(model, blocks_name, {kind: counts[-1]})
        except InvalidInput as error:
            refusals.append(str(error))
            continue
        options[kind] = Options(tuple(counts), structure.couplings)
    if not options:
        raise InvalidInput(" ".join(refusals))
    return options


def _counts(config: Any, kind: Kind, multiple_of: int) -> list[int]:
    """All counts that are considered, the whole first; every one of them loads."""
    count = group_count(config, kind)
    if kind == "neurons":
        unit = -(-max(multiple_of, count // STEPS) // multiple_of) * multiple_of
        return [count, *range((count - 1) // unit * unit, 0, -unit)]
    found = [count]
    for left in range(count - 1, 0, -1):
        try:
            smaller_config(config, {kind: left})
        except InvalidInput:
            continue
        found.append(left)
    if len(found) == 1:
        smaller_config(config, {kind: count - 1})
    return found


def _anchor(counts: Sequence[int], amounts: Sequence[int], target: int) -> int:
    """The count nearest to the one that would do alone, but at least half of the groups."""
    aim = max(float(np.interp(target, amounts, counts)), counts[0] / 2)
    return min(counts[1:], key=lambda count: abs(count - aim))
