"""A model folder whose weights are read one by one, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .conversion import Conversion, Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .models import PrunableLayer

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class NotStreamable(InvalidInput):
    """The stored weights are not the model's own by name; only transformers can load them."""


class ModelFolder:
    """Stored weights under the names that a model gives them.

    A stored name may lack or have the prefix of the model's body (``transformer.``, ``model.``),
    as transformers allows too, and what transformers renames, merges or splits on loading is
    converted as there.

    Parameters
    ----------
    path
        Folder with safetensors.
    model
        Its parameters may be on the meta device.

    Raises
    ------
    NotStreamable
        If a parameter cannot be had from stored weights in its name and shape; the sentence names
        it.
    """

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        self._model = model
        self._files = _files_by_name(path)
        self._conversion = Conversion(model)
        self._found: dict[str, tuple[Source, str]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        own = model.state_dict(keep_vars=True)
        prefix = f"{model.base_model_prefix}."
        made = self._made(own, prefix)
        for name, aliases in _aliases(own).items():
            choices = [choice for alias in aliases for choice in _spellings(alias, prefix)]
            found = next((choice for choice in choices if choice in made), None)
            if found is None and not isinstance(own[name], nn.Parameter):
                continue  # a buffer stays as the configuration makes it
            if found is None:
                raise NotStreamable(
                    f"{path} stores no weight named {name}, so its weights cannot be read by name."
                )
            source, empty = made[found]
            shape, wanted = tuple(empty.shape), tuple(own[name].shape)
            if shape != wanted:
                raise NotStreamable(f"{path} stores {name} as {shape}, but the model has {wanted}.")
            self._found[name], self._dtypes[name] = (source, found), empty.dtype

    def _made(self, own: Mapping[str, Tensor], prefix: str) -> dict[str, tuple[Source, Tensor]]:
        """What the stored weights become, by name, each with a tensor of its shape and type."""
        try:
            all_sources = self._conversion.sources(self._files)
        except (ImportError, AttributeError, TypeError) as error:
            raise NotStreamable(
                "This version of transformers converts weights in a way that is not known here "
                f"({error})."
            ) from error
        sources = [
            source
            for source in all_sources
            if any(name in own for name in _spellings(source.name, prefix))
        ]
        headers = self._read([name for source in sources for _, name in source.stored], _empty)
        made: dict[str, tuple[Source, Tensor]] = {}
        for source in sources:
            try:
                outputs = source.make(self._model, headers)
            except Exception as error:  # whatever a conversion makes of weights that do not fit it
                raise NotStreamable(
                    f"{source.stored[0][1]} cannot be converted to {source.name} block by block "
                    f"({type(error).__name__})."
                ) from error
            made.update({name: (source, empty) for name, empty in outputs.items()})
        return made

    def dtype(self, name: str) -> torch.dtype:
        """The type that a weight is stored in."""
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        """A weight, in host memory and in its stored type."""
        source, found = self._found[name]
        # Files are opened and closed each time: mapped pages would count as memory in use.
        tensors = self._read([stored for _, stored in source.stored], Tensor.clone)
        return source.make(self._model, tensors)[found]

    def source(self, name: str) -> Source | None:
        """What a weight is made of; None if it is not known by this name."""
        return self._found[name][0] if name in self._found else None

    def read_stored(self, source: Source) -> dict[str, Tensor]:
        """The stored weights that others are made of, by their stored names."""
        return self._read([stored for _, stored in source.stored], Tensor.clone)

    def as_stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the model in the form in which this folder stores them."""
        return self._conversion.undone(tensors)

    @property
    def names(self) -> list[str]:
        """The model's names of all weights, and of the buffers that are stored."""
        return list(self._found)

    def _read(self, names: list[str], take: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Something of stored weights; every file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        taken: dict[str, Tensor] = {}
        for file, stored in by_file.items():
            with _opened(file) as tensors:
                taken.update({name: take(tensors.get_tensor(name)) for name in stored})
        return taken


class StoredWeights:
    """Where a saved model has its layers' weights.

    Parameters
    ----------
    path
        Folder with safetensors.
    model
        That is stored there, or one of the same kind.
    """

    def __init__(self, path: Path, model: PreTrainedModel) -> None:
        try:
            self._folder: ModelFolder | None = ModelFolder(path, model)
        except NotStreamable:
            self._folder = None
        self._read: tuple[str, Tensor, dict[str, Tensor]] | None = None

    def parts(self, layer: PrunableLayer) -> list[dict[str, Any]]:
        """The stored matrices whose rows, one after another, are the layer's.

        Returns
        -------
        list of dict
            "tensor" (a stored name), "index" (in that tensor; None for all of it) and "transposed"
            (whether it is ``[inputs, outputs]``). Empty if transformers stores the weight in
            another way.
        """
        fused = layer.fused
        name = f"{layer.name}.weight" if fused is None else fused.name
        lies = fused.transposed if fused is not None else not isinstance(layer.module, nn.Linear)
        index = None if fused is None else layer.expert
        source = None if self._folder is None else self._folder.source(name)
        if source is None or source.converter is None:
            stored = name if source is None else source.stored[0][1]
            return [{"tensor": stored, "index": index, "transposed": lies}]
        assert self._folder is not None
        if self._read is None or self._read[0] != name:
            self._read = name, self._folder.read(name), self._folder.read_stored(source)
        whole, candidates = self._read[1:]
        matrix = whole if index is None else whole[index]
        return _found_in(matrix.T if lies else matrix, candidates, index)


def _found_in(
    matrix: Tensor, candidates: Mapping[str, Tensor], index: int | None
) -> list[dict[str, Any]]:
    """The candidates that, below one another, make up a matrix; none if they do not."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(matrix):
        for name, tensor in candidates.items():
            own = tensor[index] if tensor.ndim == 3 and index is not None else tensor
            for transposed in (False, True):
                part = own.T if transposed else own
                rows = matrix[at : at + len(part)]
                if len(part) and part.shape == rows.shape and torch.equal(part, rows):
                    where = index if tensor.ndim == 3 else None
                    found.append({"tensor": name, "index": where, "transposed": transposed})
                    at += len(part)
                    break
            else:
                continue
            break
        else:
            return []
    return found


def build_empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration with its parameters on the meta device.

    Buffers are real: what is computed from the configuration (rotary frequencies) is stored
    nowhere.

    Raises
    ------
    NotStreamable
        If the model cannot be built so, or brings code of its own.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise NotStreamable(
            f"The {config.model_type} model cannot be built without its weights "
            f"({type(error).__name__})."
        ) from error
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _files_by_name(path: Path) -> dict[str, Path]:
    """The file of every stored tensor."""
    index, single = path / _INDEX, path / _SINGLE
    if index.is_file():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise InvalidInput(f"{index} is no index of safetensors files ({error}).") from error
        return {name: path / file for name, file in listed.items()}
    if single.is_file():
        with _opened(single) as tensors:
            return dict.fromkeys(tensors.keys(), single)
    raise NotStreamable(f"{path} has neither {_SINGLE} nor {_INDEX}.")


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file} is not a readable safetensors file ({error}).") from error


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """All names of every tensor, by its first; tied ones have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def _spellings(name: str, prefix: str) -> list[str]:
    return [name, name.removeprefix(prefix), prefix + name]
