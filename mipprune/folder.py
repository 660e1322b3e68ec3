"""A model folder whose weights are read one by one, by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from solvers import InvalidInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class NotStreamable(InvalidInput):
    """The stored weights are not the model's own by name; only transformers can load them."""


class ModelFolder:
    """Stored weights under the names that a model gives them.

    A stored name may lack or have the prefix of the model's body (``transformer.``, ``model.``),
    as transformers allows too. Anything else that transformers would convert on loading is
    refused.

    Parameters
    ----------
    path
        Folder with safetensors.
    model
        Its parameters may be on the meta device.

    Raises
    ------
    NotStreamable
        If a parameter has no stored weight of its name and shape; the sentence names it.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        files = _files_by_name(path)
        self._found: dict[str, tuple[Path, str]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for name, aliases in _aliases(model).items():
            choices = [choice for alias in aliases for choice in _spellings(alias, prefix)]
            stored = next((choice for choice in choices if choice in files), None)
            if stored is None:
                raise NotStreamable(
                    f"{path} stores no weight named {name}, so its weights cannot be read by name."
                )
            self._found[name] = files[stored], stored
            shape, self._dtypes[name] = _header(*self._found[name])
            wanted = tuple(model.get_parameter(name).shape)
            if shape != wanted:
                raise NotStreamable(f"{path} stores {name} as {shape}, but the model has {wanted}.")

    def dtype(self, name: str) -> torch.dtype:
        """The type that a weight is stored in."""
        return self._dtypes[name]

    def read(self, name: str) -> Tensor:
        """A weight, in host memory and in its stored type."""
        file, stored = self._found[name]
        # Opened and closed each time: mapped pages would count as memory in use.
        with _opened(file) as tensors:
            return tensors.get_tensor(stored).clone()  # type: ignore[no-any-return]

    @property
    def names(self) -> list[str]:
        """The model's names of all weights."""
        return list(self._found)


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


def _header(file: Path, stored: str) -> tuple[tuple[int, ...], torch.dtype]:
    with _opened(file) as tensors:
        mapped = tensors.get_tensor(stored)
        return tuple(mapped.shape), mapped.dtype


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"{file} is not a readable safetensors file ({error}).") from error


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter, by its first; tied ones have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return names


def _spellings(name: str, prefix: str) -> list[str]:
    return [name, name.removeprefix(prefix), prefix + name]
