"""Orders that make no difference: of MLP neurons, of the values in a head, of the residual stream.

A layer's inputs may be reordered if all that writes and reads them is. What that is follows from
the shapes of the model built once more without weights, with fewer neurons, key-value heads or
hidden states (see `mipprune.structured.coupling`); no family is known by name. What shapes leave
open is left to trial: `moves` gives one or several possibilities, of which at most one is right.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from solvers import NM, InputOrder, InvalidInput, order_inputs

from .folder import build_empty
from .models import PrunableLayer, all_layers
from .placement import Placement
from .structured.coupling import Coupling, Kind, Layout, find_structure, group_count

Moves: TypeAlias = dict[str, tuple[int, Tensor]]
"""By the parameter's name in the model: a dimension, and the entry that comes to each place."""


@dataclass(frozen=True)
class Neurons:
    """Neurons of an MLP, in any order."""

    coupling: Coupling

    kind = "neurons"
    what = "MLP neurons"

    def order(self, saliency: Tensor, pattern: NM) -> InputOrder:
        """The order for the reader's saliencies ``[rows, d]``."""
        return order_inputs(saliency, pattern)

    def fits(self, order: Tensor) -> bool:
        """Whether an order is one of these inputs."""
        return len(order) == self.coupling.count

    def moves(self, order: Tensor, block: nn.Module) -> Iterator[Moves]:
        """What to move; each projection of a fused weight may come by itself, or each neuron."""
        for layout in get_args(Layout):
            coupling = replace(self.coupling, layout=layout)
            yield {
                f"{coupling.block_name}.{name}": (
                    dim,
                    coupling.moved(block.get_parameter(name).shape[dim], order),
                )
                for name, dim in coupling.parts.items()
            }


@dataclass(frozen=True)
class Values:
    """Entries of the values, in any order within a head; all heads of a group have the same."""

    coupling: Coupling

    kind = what = "values"

    def order(self, saliency: Tensor, pattern: NM) -> InputOrder:
        """The order for the reader's saliencies ``[rows, d]``."""
        size, heads = self.coupling.group.keys, self._heads
        if size % pattern.group:
            raise InvalidInput(
                f"Layer {self.coupling.reader.name} reads heads of {size} values, which pattern "
                f"{pattern} does not divide; leave values out of --permute."
            )
        groups = torch.split(saliency, size * heads, dim=1)
        found = [
            order_inputs(torch.cat(torch.split(group, size, dim=1)), pattern) for group in groups
        ]
        return InputOrder(
            self._inputs(torch.stack([one.order for one in found])),
            sum(one.lost for one in found),
            sum(one.lost_as_given for one in found),
        )

    def fits(self, order: Tensor) -> bool:
        """Whether an order is one of these inputs."""
        d = self.coupling.reader.weight.shape[1]
        return len(order) == d and torch.equal(self._inputs(self._within(order)), order)

    def moves(self, order: Tensor, block: nn.Module) -> Iterator[Moves]:
        """What to move, for each module that may give the values, alone or with queries and keys.

        With these, values come last: after all others, or in each group.
        """
        coupling, size = self.coupling, self.coupling.group.keys
        within = self._within(order)
        own = (within + size * torch.arange(coupling.count)[:, None]).flatten()
        path = coupling.reader.name.removeprefix(f"{coupling.block_name}.")
        reader = {
            f"{coupling.block_name}.{name}": (dim, order)
            for name, dim in coupling.parts.items()
            if name.rpartition(".")[0] == path
        }
        by_module: dict[str, dict[str, int]] = {}
        for name, dim in coupling.parts.items():
            if name.rpartition(".")[0] != path:
                by_module.setdefault(name.rpartition(".")[0], {})[name] = dim
        for parts in by_module.values():
            sizes = {block.get_parameter(name).shape[dim] for name, dim in parts.items()}
            if len(sizes) == 1:
                for index in self._among(own, within, sizes.pop()):
                    moved = {f"{coupling.block_name}.{n}": (dim, index) for n, dim in parts.items()}
                    yield {**reader, **moved}

    def _among(self, own: Tensor, within: Tensor, size: int) -> Iterator[Tensor]:
        """Where the ``size`` entries of a module come from, if values are among them."""
        if size == len(own):
            yield own
        before = self.coupling.group.queries + self.coupling.group.keys
        if size == self.coupling.count * (before + self.coupling.group.keys):
            stacked = torch.arange(size)
            stacked[size - len(own) :] = size - len(own) + own
            yield stacked
            grouped = torch.arange(size).view(self.coupling.count, -1)
            grouped[:, before:] = grouped[:, before:].gather(1, within)
            yield grouped.flatten()

    @property
    def _heads(self) -> int:
        """Heads of a group."""
        return self.coupling.group.queries // self.coupling.group.keys

    def _within(self, order: Tensor) -> Tensor:
        """The order in each group's first head, long ``[groups, values]``."""
        first = order.view(self.coupling.count, self._heads, -1)[:, 0]
        return (first - self.coupling.group.queries * torch.arange(len(first))[:, None]).clamp(
            0, self.coupling.group.keys - 1
        )

    def _inputs(self, within: Tensor) -> Tensor:
        """The order of all inputs from that in each group's heads."""
        heads = torch.arange(self.coupling.count * self._heads).view(-1, self._heads, 1)
        return (within[:, None] + self.coupling.group.keys * heads).flatten()


@dataclass(frozen=True)
class Residual:
    """The residual stream, which the whole model has in one order.

    Attributes
    ----------
    count
        Hidden states.
    parts
        Dimension that carries them, by the parameter's name in the model.
    readers
        Layers of the blocks that have them as inputs.
    """

    count: int
    parts: dict[str, int]
    readers: tuple[PrunableLayer, ...]

    what = "the residual stream"

    def moves(self, order: Tensor) -> Moves:
        """What to move."""
        return {name: (dim, order) for name, dim in self.parts.items()}


def neurons(placement: Placement) -> list[Neurons]:
    """The neurons of every block that has some.

    Raises
    ------
    InvalidInput
        If it is not understood what carries them; the sentence names the family.
    """
    return [Neurons(one) for one in _couplings(placement, "neurons", Neurons.what)]


def values(placement: Placement) -> list[Values]:
    """The values of every block that has some; errors as of `neurons`."""
    return [Values(one) for one in _couplings(placement, "kv_groups", Values.what)]


def _couplings(placement: Placement, kind: Kind, what: str) -> list[Coupling]:
    model: Any = placement.model
    try:
        half = group_count(model.config, kind) // 2
        if half == 0:
            raise InvalidInput(f"A model of type {model.config.model_type} has one for all heads.")
        structure = find_structure(model, placement.blocks_name, {kind: half})
    except InvalidInput as error:
        raise InvalidInput(
            f"To permute {what}, it has to be known what carries them, as for their removal: "
            f"{error}"
        ) from error
    return [coupling for block in structure.couplings for coupling in block]


def residual(placement: Placement) -> Residual:
    """The residual stream; errors as of `neurons`."""
    model: Any = placement.model
    family, count = model.config.model_type, model.config.get_text_config().hidden_size
    left = count // 2
    try:
        smaller = build_empty(_fewer_hidden_states(model.config, left), model.dtype)
    except Exception as error:  # whatever transformers objects to
        raise InvalidInput(
            f"To permute the residual stream of a model of type {family}, it has to be built with "
            f"another hidden size, and cannot ({' '.join(str(error).split())}); leave residual "
            "out of --permute."
        ) from error
    shapes = {name: tuple(one.shape) for name, one in smaller.named_parameters()}
    parts = {}
    for name, parameter in model.named_parameters():
        old, new = tuple(parameter.shape), shapes.get(name, ())
        changed = [dim for dim, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
        if len(old) != len(new) or [(old[dim], new[dim]) for dim in changed] not in (
            [],
            [(count, left)],
        ):
            raise InvalidInput(
                f"In a model of type {family}, {name} is {list(old)}, and {list(new)} with {left} "
                f"of {count} hidden states, which is not one dimension of them; leave residual out "
                "of --permute."
            )
        if changed:
            parts[name] = changed[0]
    layers = all_layers(placement.blocks_name, placement.blocks)
    readers = [layer for layer in layers if _reads(layer, parts)]
    return Residual(count, parts, tuple(readers))


def _fewer_hidden_states(config: Any, left: int) -> Any:
    """The configuration with ``left`` hidden states; heads and neurons stay as they are."""
    new = copy.deepcopy(config)
    text = new.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is not None:
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    text.hidden_size = left
    return type(config).from_dict(json.loads(new.to_json_string(use_diff=False)))


def _reads(layer: PrunableLayer, parts: dict[str, int]) -> bool:
    """Whether a layer's inputs are what its weight has of the moved dimension."""
    inputs = 1 if isinstance(layer.module, nn.Linear) else 0
    return layer.fused is None and parts.get(f"{layer.name}.weight") == inputs
