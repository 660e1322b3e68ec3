"""The order in which the inputs of a block's layers arise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .experts import FusedWeight, watched
from .models import PrunableLayer
from .ranks import ALONE, Ranks


class Stages:
    """Of every block, the stages in which its layers are pruned, remembered.

    Layers that are given the same tensor are one stage (query, key and value), and so are the
    same layers of all experts; stages follow each other as their inputs first arise in a forward
    (then the output of attention, gate and up, down). Walks over the same blocks share one.

    Parameters
    ----------
    ranks
        The first process's order is everyone's.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks, self._known = ranks, dict[int, list[list[str]]]()

    def of(
        self,
        index: int,
        block: nn.Module,
        layers: Sequence[PrunableLayer],
        forward: Callable[[], object],
    ) -> list[list[PrunableLayer]]:
        """Layers of block ``index`` in order; ``forward`` runs the block once if need be.

        A layer that this forward does not reach, nor any of its kind, is in the last stage.
        """
        if index not in self._known:
            found = _observed(block, layers, forward)
            self._known[index] = self._ranks.gather_objects(found)[0]
        named = {layer.name: layer for layer in layers}
        return [[named[name] for name in stage] for stage in self._known[index]]


def _observed(
    block: nn.Module, layers: Sequence[PrunableLayer], forward: Callable[[], object]
) -> list[list[str]]:
    alike = _kinds(block, layers)
    order: dict[str, str] = {}  # by kind, in the order seen: the kind that it shares a stage with
    seen: dict[int, tuple[str, object]] = {}  # inputs are kept, so that their ids stay theirs

    def see(name: str, inputs: object) -> None:
        first = seen.setdefault(id(inputs), (alike[name], inputs))[0]
        order.setdefault(alike[name], order.get(first, first))

    def routed(fused: FusedWeight, expert: int, inputs: object) -> None:
        see(f"{fused.name}[{expert}]", inputs)

    def hook(name: str) -> Any:
        return lambda _, args: see(name, args[0])

    fused = {layer.fused.name: layer.fused for layer in layers if layer.fused}
    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            if layer.fused is None:
                handle = layer.module.register_forward_pre_hook(hook(layer.name))
                stack.callback(handle.remove)
        stack.enter_context(watched(list(fused.values()), routed))
        forward()
    stages: dict[str, list[str]] = {owner: [] for owner in order.values()}
    stages[""] = []  # of no kind that was seen
    for layer in layers:
        stages[order.get(alike[layer.name], "")].append(layer.name)
    return [stage for stage in stages.values() if stage]


def _kinds(block: nn.Module, layers: Sequence[PrunableLayer]) -> dict[str, str]:
    """By layer: a name that the same layers of all experts have in common."""
    lists = {name for name, module in block.named_modules() if isinstance(module, nn.ModuleList)}
    within = {module: name for name, module in block.named_modules()}

    def kind(layer: PrunableLayer) -> str:
        if layer.fused is not None:
            return layer.fused.name
        parts = within[layer.module].split(".")
        return ".".join(
            "*" if ".".join(parts[:at]) in lists else part for at, part in enumerate(parts)
        )

    return {layer.name: kind(layer) for layer in layers}
