"""How many neurons and how many KV groups go, when only the number of parameters is given.

Every block has the same counts, so there are two numbers to choose. What a count costs is read off
one elimination per block (`solvers.structured.elimination_curve`), which gives the loss at every
count at once; losses of neurons and of attention groups are made comparable by what they do to the
model: the KL divergence of the next-token distribution with one kind removed from all blocks, per
unit of their summed loss. The cheapest pair of counts within the budget is a multiple-choice
knapsack, solved exactly (`solvers.knapsack`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from solvers import InvalidInput
from solvers.knapsack import choose
from solvers.structured import elimination_curve, expand, refitted

from ..folder import build_empty
from ..loss_curves import Divergence
from ..models import PrunableLayer
from ..placement import Placement
from .coupling import WORDS, Coupling, Kind, find_structure, group_count, smaller_config

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


@torch.no_grad()
def counts_within(
    placement: Placement,
    share: float,
    walk: Callable[[set[str]], BlockWalk],
    probe: Tensor,
    batch_size: int,
    *,
    multiple_of: int = 1,
    damping: float = 1e-2,
    add_biases: bool = False,
) -> tuple[dict[Kind, int], list[Curve]]:
    """Counts that keep at most a share of the model's parameters, at the least cost.

    Parameters
    ----------
    placement
        The model; it is left as it was.
    share
        Of its parameters to keep at most, in (0, 1).
    walk
        Makes a walk over the dense blocks that watches the layers named.
    probe
        int64 ``[windows, length]``, for the divergences.
    batch_size
        Windows per forward of them.
    multiple_of
        Of the neurons left.
    damping
        Of the least squares.
    add_biases
        Whether the smaller model will have biases that this one lacks.

    Returns
    -------
    counts : dict
        Groups to keep, of the kinds that lose some.
    curves : list of Curve
        What was measured.

    Raises
    ------
    InvalidInput
        If neither kind can be removed, or not so many of them.
    """
    model: Any = placement.model
    if not 0 < share < 1:
        raise InvalidInput(f"Share {share} of the parameters is outside (0, 1).")
    total = sum(one.numel() for one in model.parameters())
    target = total - int(total * share) + (_added(model) if add_biases else 0)
    options: dict[Kind, list[int]] = {}
    couplings: dict[Kind, list[Coupling]] = {}
    refusals = []
    for kind in get_args(Kind):
        try:
            options[kind] = _counts(model.config, kind, multiple_of)
            structure = find_structure(model, placement.blocks_name, {kind: options[kind][-1]})
        except InvalidInput as error:
            refusals.append(str(error))
            continue
        couplings[kind] = [one for block in structure.couplings for one in block]
    if not couplings:
        raise InvalidInput(" ".join(refusals))
    each = {kind: _parameters(model, of_kind) for kind, of_kind in couplings.items()}
    most = sum(each[kind] * (options[kind][0] - options[kind][-1]) for kind in couplings)
    if target > most:
        raise InvalidInput(
            f"At most {most / total:.1%} of the parameters can go with the "
            f"{' and '.join(WORDS[kind] for kind in couplings)}; keep at least "
            f"{1 - most / total:.3f}."
        )
    anchors = {kind: _anchor(options[kind], target / each[kind]) for kind in couplings}
    losses = {kind: torch.zeros(options[kind][0] + 1, dtype=torch.float64) for kind in couplings}
    weights: dict[Kind, list[tuple[PrunableLayer, Tensor]]] = {kind: [] for kind in couplings}
    readers = {one.reader.name: one for of_kind in couplings.values() for one in of_kind}
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
    for kind in couplings:
        measured = divergence.of_all(weights[kind])
        anchor_loss = float(losses[kind][anchors[kind]])
        scale = measured / anchor_loss if anchor_loss > 0 else 0.0
        costs = tuple(scale * float(losses[kind][count]) for count in options[kind])
        curves.append(Curve(kind, each[kind], measured, anchors[kind], tuple(options[kind]), costs))
    chosen = choose(
        [one.costs for one in curves],
        [[one.parameters * (one.counts[0] - count) for count in one.counts] for one in curves],
        target,
    )
    counts = {one.kind: one.counts[index] for one, index in zip(curves, chosen, strict=True)}
    return {kind: left for kind, left in counts.items() if left < options[kind][0]}, curves


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


def _added(model: Any) -> int:
    """Parameters of all biases that the configuration can add; no fewer than will be added."""
    built = build_empty(smaller_config(model.config, {}, get_args(Kind)), model.dtype)
    there = {name for name, _ in model.named_parameters()}
    return sum(one.numel() for name, one in built.named_parameters() if name not in there)


def _parameters(model: Any, couplings: list[Coupling]) -> int:
    """Parameters of one group, summed over the blocks."""
    total = 0
    for one in couplings:
        block = model.get_submodule(one.block_name)
        total += sum(block.get_parameter(name).numel() for name in one.parts) // one.count
    return total


def _anchor(counts: list[int], wanted: float) -> int:
    """The count nearest to the one that would do alone, but at least half of the groups."""
    aim = max(counts[0] - wanted, counts[0] / 2)
    return min(counts[1:], key=lambda count: abs(count - aim))
