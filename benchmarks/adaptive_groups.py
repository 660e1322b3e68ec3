"""Structured pruning with another number of groups in every block, by zeros.

A configuration has one number for all blocks, so this is no folder that loads plainly: the model
keeps its shapes, and what is removed is zero. FLAP as published is so ("AL-AM" in its code), and
the same can be asked of elimination.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from yardstick import WINDOW

from mipprune.calibration import Windows
from mipprune.gram import Gram
from mipprune.loss_curves import Divergence
from mipprune.placement import Placement
from mipprune.structured import GroupResult, Method
from mipprune.structured.choice import choose
from mipprune.structured.coupling import Coupling, Kind, find_structure, group_count
from mipprune.structured.shrink import PROBE, shift_bias, silence
from mipprune.surrogate import Inputs
from mipprune.walk import BlockStep, BlockWalk
from solvers import PerRow, removed_count
from solvers.across_layers import cheapest_counts, flap_standardised, lowest
from solvers.structured import (
    elimination_curve,
    expand,
    input_groups,
    most_salient,
    refitted,
    wanda_sp,
)

FLAP = Method("flap", "none", "add")
OURS = Method("eliminate", "least_squares", "add")


class Adaptive:
    """One kind of groups of a model, as many of which go in all as a share of every block would be.

    Parameters
    ----------
    model
        Left with zeros.
    windows
        Calibration tokens.
    kind, share
        What goes, and how much of it.
    """

    def __init__(self, model: Any, windows: Windows, kind: Kind, share: float) -> None:
        self.model, self._windows = model, windows
        self._placement = Placement(model)
        self._count = group_count(model.config, kind)
        structure = find_structure(model, self._placement.blocks_name, {kind: self._count - 1})
        self._couplings = {one.reader.name: one for block in structure.couplings for one in block}
        self.uniform = self._count - removed_count(self._count, share)
        self.removed = len(self._couplings) * (self._count - self.uniform)
        self.kept: list[int] = []
        self.results: list[GroupResult] = []
        self.loss_wanda_sp = 0.0

    def flap(self) -> None:
        """FLAP as published: statistics of the dense model, and biases."""
        grams = {one.reader.name: gram for _, one, gram in self._walk(propagate=False)}
        scores = [
            flap_standardised(one.reader.weight, gram.matrix, gram.mean, one.of_inputs())
            for one, gram in zip(self._couplings.values(), grams.values(), strict=True)
        ]
        masks = lowest(scores, self.removed)
        for one, mask in zip(self._couplings.values(), masks, strict=True):
            gram = grams[one.reader.name]
            found = self._chosen(one, gram, int(mask.sum()), FLAP)
            assert torch.equal(found.kept, mask[0])
            one.reader.weight.copy_(found.weight)
            shift_bias(one.reader.module, found.shift)

    def eliminate(self) -> None:
        """Elimination with the counts that are the cheapest by its curves.

        A block's curve is scaled by the KL divergence with that block's groups alone removed, at
        the uniform count.
        """
        divergence = Divergence(self._placement, self._windows.tokens[:PROBE], 8)
        curves = []
        for _, one, gram in self._walk(propagate=False):
            weight, groups = one.reader.weight, one.of_inputs()
            curve, order = elimination_curve(weight, gram.matrix, groups, OURS.damping)
            kept = torch.ones(1, self._count, dtype=torch.bool)
            kept[0, order[: self._count - self.uniform]] = False
            new = refitted(weight, gram.matrix, expand(kept, groups)[0], OURS.damping)
            measured = divergence.of(one.reader, new.to(weight.dtype))
            curves.append(curve * (measured / float(curve[self.uniform])))
        counts = dict(zip(self._couplings, cheapest_counts(curves, self.removed), strict=True))
        for step, one, gram in self._walk(propagate=True):
            silence(step, one, self._chosen(one, gram, counts[one.reader.name], OURS))

    def _walk(self, propagate: bool) -> Iterator[tuple[BlockStep, Coupling, Gram]]:
        watched = set(self._couplings)
        tokens = self._windows.tokens
        for step in BlockWalk(self._placement, tokens, 8, propagate=propagate, watched=watched):
            for layer in step.layers:
                if layer.name in watched:
                    yield step, self._couplings[layer.name], step.grams.gram(layer)

    def _chosen(self, one: Coupling, gram: Gram, keep: int, method: Method) -> Any:
        weight, groups = one.reader.weight, one.of_inputs()
        plain = input_groups(weight, gram.matrix, groups, PerRow(keep=self.uniform))
        reference = most_salient(wanda_sp(weight, gram.matrix, groups), self.uniform)
        self.loss_wanda_sp += float(plain.objective(reference))
        found = choose(one, Inputs(gram.matrix, gram.mean), gram.tokens, keep, method)
        self.results.append(found.result)
        self.kept.append(keep)
        return found


@torch.no_grad()
def adapted(name: str, model: Any, windows: Windows, removal: dict[str, float]) -> Adaptive:
    """Groups removed from a model by "flap" or "eliminate"."""
    assert windows.tokens.shape[1] == WINDOW
    ((kind, share),) = removal.items()
    found = Adaptive(model, windows, kind, share)  # type: ignore[arg-type]
    getattr(found, name)()
    return found
