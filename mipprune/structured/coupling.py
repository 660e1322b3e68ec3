"""What has to go together when neurons or key-value groups are removed from a model.

No family is known by name. The model is built once more without weights (on the meta device) from a
configuration with smaller counts; the parameters whose shapes differ are those that carry the
groups, and the one linear layer of a block whose *inputs* differ reads them. Where a parameter
holds several projections in one, the order of its rows is found by trial: a block made smaller has
to give what the block gives when its reader sees zeros (see `mipprune.structured.smaller`).
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from ..folder import NotStreamable, build_empty
from ..models import PrunableLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Kind = Literal["kv_groups", "neurons"]
"""In the order in which a block computes them. A group is a key-value head with its queries."""

Layout = Literal["grouped", "stacked"]
"""Rows of a fused parameter: all of group 0, then of group 1; or one projection after the other."""

WORDS: dict[Kind, str] = {"kv_groups": "KV groups", "neurons": "MLP neurons"}

_NEURONS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""How configurations call the neurons of an MLP."""

_BIASES: dict[Kind, tuple[str, ...]] = {
    "kv_groups": ("attention_bias",),
    "neurons": ("mlp_bias",),
}
"""How configurations that may have biases say so."""


@dataclass(frozen=True)
class Group:
    """How many entries of each projection belong to one group.

    Attributes
    ----------
    queries
        Entries of the queries (and of the output projection's inputs); 1 for a neuron.
    keys
        Entries of the keys, and as many of the values; 0 for a neuron.
    """

    queries: int
    keys: int = 0


@dataclass(frozen=True)
class Coupling:
    """The groups of one block, and every parameter that carries them.

    Attributes
    ----------
    kind, count
        What the groups are, and how many there are.
    block_name
        Of the block, in the model.
    reader
        The layer whose inputs they are: the MLP's or the attention's output projection.
    group
        Entries of one group.
    parts
        Dimension that carries the groups, by the parameter's name in the block, the reader's weight
        included.
    layout
        Of parameters that hold several projections.
    """

    kind: Kind
    count: int
    block_name: str
    reader: PrunableLayer
    group: Group
    parts: dict[str, int]
    layout: Layout = "grouped"

    def of_inputs(self) -> Tensor:
        """Group of each of the reader's inputs, long ``[d]``."""
        return self.of_entries(self.reader.weight.shape[1])

    def of_entries(self, size: int) -> Tensor:
        """Group of each of ``size`` entries of a part, long."""
        each = size // self.count
        if self.layout == "grouped" or each == 1:
            return torch.arange(size) // each
        if self.kind == "neurons":
            return torch.arange(size) % self.count
        queries, keys = self.group.queries, self.group.keys
        if each != queries + 2 * keys:
            return torch.arange(size) // each
        return torch.cat(
            [torch.arange(self.count * width) // width for width in (queries, keys, keys)]
        )

    def moved(self, size: int, order: Tensor) -> Tensor:
        """Where each of ``size`` entries of a part comes from when group ``order[k]`` is k-th."""
        entries = self.of_entries(size).argsort(stable=True).view(self.count, -1)
        index = torch.empty(size, dtype=torch.long)
        index[entries.flatten()] = entries[order.cpu()].flatten()
        return index

    def cut(self, name: str, tensor: Tensor, kept: Tensor) -> Tensor:
        """What is left of a parameter when only groups with ``kept`` (bool ``[K]``) are."""
        dim = self.parts[name]
        held = kept.cpu()[self.of_entries(tensor.shape[dim])].nonzero()[:, 0]
        return tensor.index_select(dim, held.to(tensor.device))


@dataclass(frozen=True)
class Options:
    """Numbers of groups of one kind that could be left in every block.

    Attributes
    ----------
    counts
        The whole first; a configuration can say each of them.
    couplings
        By block; those without such groups have none.
    """

    counts: tuple[int, ...]
    couplings: list[list[Coupling]]


def group_count(config: PretrainedConfig, kind: Kind) -> int:
    """How many groups every block has, by the configuration.

    Raises
    ------
    InvalidInput
        If the configuration does not say it in one number.
    """
    text = config.get_text_config()
    if kind == "neurons":
        count = getattr(text, _neurons(text))
        count = 4 * text.hidden_size if count is None else count
    else:
        count = getattr(text, "num_key_value_heads", None)
        count = getattr(text, "num_attention_heads", None) if count is None else count
    if not isinstance(count, int):
        raise InvalidInput(
            f"The configuration of a model of type {config.model_type} does not say the number of "
            f"{WORDS[kind]} in one number, so that they cannot be removed."
        )
    return count


def _neurons(text: Any) -> str:
    name = next((name for name in _NEURONS if hasattr(text, name)), None)
    if name is None:
        raise InvalidInput(
            f"The configuration of a model of type {text.model_type} has no number of MLP neurons "
            f"(none of {', '.join(_NEURONS)}), so that they cannot be removed."
        )
    return name


def smaller_config(
    config: PretrainedConfig, counts: dict[Kind, int], biases: tuple[Kind, ...] = ()
) -> PretrainedConfig:
    """The configuration with other counts.

    Parameters
    ----------
    config
        Of the model; it is left as it is.
    counts
        Groups left, of the kinds that change. The dimension of a head and the queries per group
        stay.
    biases
        Kinds whose reader is to have a bias.

    Raises
    ------
    InvalidInput
        If such a configuration is not one that transformers loads, or cannot say that there is a
        bias.
    """
    new = copy.deepcopy(config)
    text: Any = new.get_text_config()
    for kind in biases:
        name = next((name for name in _BIASES[kind] if hasattr(text, name)), None)
        if name is None:
            raise InvalidInput(
                f"The configuration of a model of type {config.model_type} cannot say that there "
                f"is a bias after the {WORDS[kind]}; give --bias existing or none."
            )
        setattr(text, name, True)
    said = []
    try:
        for kind, count in counts.items():
            said.append(f"{count} {WORDS[kind]}")
            if kind == "neurons":
                setattr(text, _neurons(text), count)
                continue
            before = group_count(config, kind)
            heads = text.num_attention_heads
            text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
            text.num_attention_heads = heads // before * count
            if hasattr(text, "num_key_value_heads"):
                text.num_key_value_heads = count
        written = json.loads(new.to_json_string(use_diff=False))
        return type(config).from_dict(written)
    except Exception as error:  # whatever transformers objects to
        raise InvalidInput(
            f"A configuration of type {config.model_type} with {' and '.join(said)} is none that "
            f"transformers loads ({' '.join(str(error).split())}); remove another number of them."
        ) from error


@dataclass(frozen=True)
class Structure:
    """The smaller model without weights, and what to cut for it.

    Attributes
    ----------
    model
        Parameters on the meta device.
    couplings
        By block, in the order of `Kind`; blocks without groups have none.
    added
        Names in the smaller model of the biases that the old one lacks.
    """

    model: PreTrainedModel
    couplings: list[list[Coupling]]
    added: tuple[str, ...]


def find_structure(
    model: PreTrainedModel,
    blocks_name: str,
    counts: dict[Kind, int],
    biases: tuple[Kind, ...] = (),
) -> Structure:
    """Find by shapes what carries the groups.

    Parameters
    ----------
    model
        Its parameters may be on the meta device.
    blocks_name
        From `find_blocks`.
    counts
        Groups left in every block; all fewer than there are.
    biases
        As for `smaller_config`.

    Raises
    ------
    InvalidInput
        If such a model cannot be built, or not by removing groups from this one; the sentence
        names the family and the reason.
    """
    blocks: Any = model.get_submodule(blocks_name)
    found: list[list[Coupling]] = [[] for _ in blocks]
    family = model.config.model_type
    for kind in get_args(Kind):
        if kind in counts:
            alone = empty_model(model, {kind: counts[kind]})
            _find(model, alone, blocks_name, kind, counts[kind], found)
    smaller = empty_model(model, counts, biases)
    old, new = _shapes(model), _shapes(smaller)
    added = tuple(name for name in new if name not in old)
    if any(not name.endswith(".bias") for name in added) or set(old) - set(new):
        raise InvalidInput(
            f"A model of type {family} with fewer {_and(counts)} has other parameters."
        )
    for kind in biases:
        for coupling in (one for block in found for one in block if one.kind == kind):
            if f"{coupling.reader.name}.bias" not in new:
                raise InvalidInput(
                    f"A model of type {family} has no bias after the {WORDS[kind]}, whatever its "
                    "configuration says; give --bias existing or none."
                )
    return Structure(smaller, found, added)


def empty_model(
    model: PreTrainedModel, counts: dict[Kind, int], biases: tuple[Kind, ...] = ()
) -> PreTrainedModel:
    """The model with other counts, parameters on the meta device; see `smaller_config`."""
    config = smaller_config(model.config, counts, biases)
    try:
        return build_empty(config, model.dtype)
    except NotStreamable as error:
        reason = " ".join(str(error.__cause__).split())
        raise InvalidInput(
            f"A smaller model of type {config.model_type} cannot be built: {reason}"
        ) from error


def _find(
    model: PreTrainedModel,
    smaller: PreTrainedModel,
    blocks_name: str,
    kind: Kind,
    left: int,
    found: list[list[Coupling]],
) -> None:
    """Add every block's coupling of one kind."""
    family, count = model.config.model_type, group_count(model.config, kind)
    old, new = _shapes(model), _shapes(smaller)
    parts: list[dict[str, int]] = [{} for _ in found]
    for name in old:
        if name not in new or new[name] == old[name]:
            continue
        block, _, rest = name.removeprefix(f"{blocks_name}.").partition(".")
        changed = [
            dim for dim, (a, b) in enumerate(zip(old[name], new[name], strict=False)) if a != b
        ]
        inside = name.startswith(f"{blocks_name}.")
        dim = changed[0]
        if len(old[name]) > 2:
            raise InvalidInput(
                f"The {WORDS[kind]} of a model of type {family} are those of experts ({name}), "
                "which cannot be removed."
            )
        whole = len(changed) == 1 and old[name][dim] * left == new[name][dim] * count
        if not (inside and whole and old[name][dim] % count == 0):
            raise InvalidInput(
                f"In a model of type {family}, {name} is {list(old[name])}, and {list(new[name])} "
                f"with {left} of {count} {WORDS[kind]}, which is not by leaving groups out."
            )
        parts[int(block)][rest] = dim
    if not any(parts):
        raise InvalidInput(
            f"The {WORDS[kind]} of a model of type {family} cannot be removed: {left} in place of "
            f"{count} in its configuration make no parameter smaller."
        )
    for index, of_block in enumerate(parts):
        if of_block:
            prefix = f"{blocks_name}.{index}"
            reader = _reader(model.get_submodule(prefix), of_block, prefix, family, kind)
            inputs = reader.weight.shape[1]
            group = Group(1)
            if kind == "kv_groups":
                text: Any = model.config.get_text_config()
                queries = inputs // count
                group = Group(queries, queries // (text.num_attention_heads // count))
            elif inputs != count:
                raise InvalidInput(
                    f"Layer {reader.name} has {inputs} inputs for {count} neurons; the structure "
                    f"of a model of type {family} is not understood."
                )
            found[index].append(Coupling(kind, count, prefix, reader, group, of_block))


def _reader(
    block: nn.Module, parts: dict[str, int], prefix: str, family: str, kind: Kind
) -> PrunableLayer:
    """The one linear layer whose inputs are the groups; no other layer may mix them."""
    from transformers.pytorch_utils import Conv1D

    readers = []
    for name, dim in parts.items():
        path, _, key = name.rpartition(".")
        module = block.get_submodule(path)
        if "Norm" in type(module).__name__:
            raise InvalidInput(
                f"In a model of type {family}, {prefix}.{path} normalises over all {WORDS[kind]}, "
                "so that none can be removed without a change to the others."
            )
        inputs = 1 if isinstance(module, nn.Linear) else 0
        if isinstance(module, (nn.Linear, Conv1D)) and key == "weight" and dim == inputs:
            readers.append(PrunableLayer(f"{prefix}.{path}", module))
    if len(readers) != 1:
        raise InvalidInput(
            f"In block {prefix} of a model of type {family}, {len(readers)} layers read the "
            f"{WORDS[kind]}, not one; they cannot be removed."
        )
    return readers[0]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}


def _and(counts: dict[Kind, int]) -> str:
    return " and ".join(WORDS[kind] for kind in counts)
