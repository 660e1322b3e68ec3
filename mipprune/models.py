"""Models: reading them, finding their blocks, and the weights in a block that can be pruned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .embedded import MODEL_NAME, MODEL_PATH

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "bfloat16", "float16"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Device by name; "auto" is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InvalidInput(
            f"Device '{device}' is unknown; use auto, cpu, cuda or cuda:N."
        ) from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"Device '{device}' is not at hand: torch sees no CUDA GPU; use cpu.")
    return resolved


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, and the type its weights are stored in."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype


def load_model(source: str, device: torch.device, dtype: DType = "auto") -> LoadedModel:
    """Read a causal language model and its tokenizer.

    Parameters
    ----------
    source
        A folder, a Hugging Face hub id, or "embedded". Code that a model brings along is never
        run.
    device
        Where to put the model.
    dtype
        To compute in. "auto" takes the stored type on a GPU and float32 on the CPU, where half
        precision is slow.

    Raises
    ------
    InvalidInput
        If there is no such model or it is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if dtype != "auto" and dtype not in _DTYPES:
        raise InvalidInput(f"dtype '{dtype}' is none of auto, {', '.join(_DTYPES)}.")
    path = str(MODEL_PATH) if source == MODEL_NAME else str(Path(source).expanduser())
    if _is_path(source) and not Path(path).is_dir():
        raise InvalidInput(f"There is no model folder at {path}.")
    try:
        config = AutoConfig.from_pretrained(path)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InvalidInput(
                f"'{source}' holds a {config.model_type} model, which is no causal language model."
            )
        tokenizer = AutoTokenizer.from_pretrained(path)
        stored = config.dtype
        wanted: Any = _DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=wanted)
    except InvalidInput:
        raise
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"'{source}' cannot be read as a causal language model: {_first_line(error)}"
        ) from error
    return LoadedModel(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        stored_dtype=stored if isinstance(stored, torch.dtype) else model.dtype,
    )


def _is_path(source: str) -> bool:
    """Whether a model's name can only mean a folder (a hub id is ``name`` or ``owner/name``)."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True)
class PrunableLayer:
    """A linear layer of a block.

    Attributes
    ----------
    name
        Its full name in the model.
    module
        ``nn.Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """View ``[outputs, inputs]`` of the weight; writing to it changes the model."""
        weight: Tensor = self.module.weight.data  # type: ignore[assignment]
        return weight if isinstance(self.module, nn.Linear) else weight.T


def find_blocks(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, and its name in the model.

    It is the longest outermost ``ModuleList`` whose members are all of one class; ``name``
    overrides that choice.

    Raises
    ------
    InvalidInput
        If there is no such list.
    """
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise InvalidInput(f"The model has no list of blocks named '{name}'.")
        return name, found
    candidates: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            inside_another = any(path.startswith(f"{outer}.") for outer in candidates)
            if not inside_another:
                candidates[path] = module
    if not candidates:
        raise InvalidInput(
            "The model has no list of equal blocks; name it with the option for blocks."
        )
    best = max(candidates, key=lambda path: len(candidates[path]))
    return best, candidates[best]


def prunable_layers(block: nn.Module, prefix: str) -> list[PrunableLayer]:
    """All linear layers of a block, in the order of its modules.

    Raises
    ------
    InvalidInput
        If a weight is quantised, or shared by two layers.
    """
    layers = [PrunableLayer(name, module) for name, module in _linear_modules(block, prefix)]
    seen: dict[int, str] = {}
    for layer in layers:
        weight: Tensor = layer.module.weight  # type: ignore[assignment]
        if not weight.is_floating_point():
            raise InvalidInput(
                f"Layer {layer.name} has weights of type {weight.dtype}; "
                "give the model before quantisation."
            )
        if id(weight) in seen:
            raise InvalidInput(
                f"Layers {seen[id(weight)]} and {layer.name} share one weight, "
                "which pruning layer by layer cannot do."
            )
        seen[id(weight)] = layer.name
    return layers


def _linear_modules(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    for name, module in block.named_modules(prefix=prefix):
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module


@dataclass(frozen=True)
class Coverage:
    """How many of the block weights (matrices and larger) are prunable."""

    prunable: int
    total: int

    @property
    def share(self) -> float:
        """Prunable share, 0 to 1."""
        return self.prunable / self.total if self.total else 0.0


def coverage(blocks_name: str, blocks: nn.ModuleList) -> Coverage:
    """Coverage over all blocks.

    Raises
    ------
    InvalidInput
        If nothing can be pruned.
    """
    prunable = sum(
        layer.weight.numel()
        for i, block in enumerate(blocks)
        for layer in prunable_layers(block, f"{blocks_name}.{i}")
    )
    total = sum(p.numel() for p in blocks.parameters() if p.ndim >= 2)
    if prunable == 0:
        raise InvalidInput(
            f"The blocks {blocks_name} hold no linear layer (nn.Linear or Conv1D) to prune."
        )
    return Coverage(prunable, total)
