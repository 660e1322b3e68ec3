"""Models: reading them, finding their blocks, and the weights in a block that can be pruned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from solvers import InvalidInput

from .embedded import MODEL_NAME, MODEL_PATH
from .experts import FusedWeight, fused_weights, router_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

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


def load_model(
    source: str,
    device: torch.device,
    dtype: DType = "auto",
    trust_remote_code: bool = False,
    at: torch.device | None = None,
) -> LoadedModel:
    """Read a causal language model and its tokenizer.

    Parameters
    ----------
    source
        A folder, a Hugging Face hub id, or "embedded".
    device
        Where the model computes.
    dtype
        To compute in. "auto" takes the stored type on a GPU and float32 on the CPU, where half
        precision is slow.
    trust_remote_code
        Run the code that the model brings along, where transformers does not know its type. It
        can do anything that you can.
    at
        Where to put the model for now, if not on its device.

    Raises
    ------
    InvalidInput
        If there is no such model, it is no causal language model, is quantised, or needs code of
        its own that is not trusted.
    """
    from transformers import AutoModelForCausalLM

    described = describe_model(source, dtype, trust_remote_code)
    wanted: Any = described.dtype or (torch.float32 if device.type == "cpu" else "auto")
    with _readable(source):
        model, found = AutoModelForCausalLM.from_pretrained(
            described.path,
            dtype=wanted,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
        if found["missing_keys"]:  # transformers would go on with random values
            raise InvalidInput(
                f"'{source}' lacks the weight {min(found['missing_keys'])} "
                f"({len(found['missing_keys'])} in all); get all of its files again."
            )
    stored = described.stored_dtype
    return LoadedModel(
        model=model.to(at or device).eval(),
        tokenizer=described.tokenizer,
        stored_dtype=stored if stored is not None else model.dtype,
    )


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model before its weights are read.

    Attributes
    ----------
    path
        Its folder, or its hub id.
    config, tokenizer
        As transformers reads them.
    dtype
        To compute in; None for "auto".
    stored_dtype
        Type that the weights are stored in; None if the configuration does not tell.
    """

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype | None
    stored_dtype: torch.dtype | None


def describe_model(
    source: str, dtype: DType = "auto", trust_remote_code: bool = False
) -> ModelDescription:
    """Read a causal language model's configuration and tokenizer; arguments as of `load_model`."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if dtype != "auto" and dtype not in _DTYPES:
        raise InvalidInput(f"dtype '{dtype}' is none of auto, {', '.join(_DTYPES)}.")
    path = str(MODEL_PATH) if source == MODEL_NAME else str(Path(source).expanduser())
    if _is_path(source) and not Path(path).is_dir():
        raise InvalidInput(f"There is no model folder at {path}.")
    with _readable(source):
        # Said every time: left unsaid, transformers asks at the terminal and may then run it.
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        refuse_quantised(config)
        own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own:
            raise InvalidInput(
                f"'{source}' holds a {config.model_type} model, which is no causal language model."
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else None
    return ModelDescription(path, config, tokenizer, _DTYPES.get(dtype), stored)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Say in one sentence what transformers could not read."""
    try:
        yield
    except (InvalidInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of many kinds; all mean that its files are no model
        if "trust_remote_code" in str(error):
            raise InvalidInput(
                f"'{source}' needs code of its own, which is not run; read that code, and if you "
                "trust it, say so with --trust-remote-code (in Python: trust_remote_code=True)."
            ) from None
        raise InvalidInput(
            f"'{source}' cannot be read as a causal language model: {_first_line(error)}"
        ) from error


def _is_path(source: str) -> bool:
    """Whether a model's name can only mean a folder (a hub id is ``name`` or ``owner/name``)."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1


def _first_line(error: Exception) -> str:
    """The first line, with the kind of error if that is not one that speaks for itself."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    plain = isinstance(error, (OSError, ValueError)) and text
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")


@dataclass(frozen=True)
class PrunableLayer:
    """A linear layer of a block, or one expert's matrix of a fused weight.

    Attributes
    ----------
    name
        Its full name in the model; an expert's ends with its number, ``gate_up_proj[3]``.
    module
        ``nn.Linear``, or GPT-2's ``Conv1D``, which stores its weight transposed, or the owner of
        the fused weight.
    fused, expert
        The fused weight and the number of the expert; None for a layer of its own.
    """

    name: str
    module: nn.Module
    fused: FusedWeight | None = None
    expert: int = 0

    @property
    def parameter(self) -> nn.Parameter:
        """The model's parameter that holds the weight, with those of other experts or alone."""
        return self.module.get_parameter(self.fused.key if self.fused else "weight")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that pruning may change: `parameter`, and the bias if there is one."""
        bias = None if self.fused is not None else self.module._parameters.get("bias")
        return [self.parameter] if bias is None else [self.parameter, bias]

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[outputs]``, to read and to write; None for none, or an expert."""
        return self.parameters[1].data if len(self.parameters) > 1 else None

    @property
    def weight(self) -> Tensor:
        """View ``[outputs, inputs]`` of the weight; writing to it changes the model."""
        if self.fused is not None:
            return self.fused.expert(self.expert)
        weight = self.parameter.data
        return weight if isinstance(self.module, nn.Linear) else weight.T


def find_blocks(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, and its name in the model.

    It is the longest outermost ``ModuleList`` whose members are all of one class, or all decoder
    layers to transformers (hybrid models have several classes of them); ``name`` overrides that
    choice.

    Raises
    ------
    InvalidInput
        If there is no such list, or the model is quantised.
    """
    refuse_quantised(getattr(model, "config", None))
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if not isinstance(found, nn.ModuleList) or len(found) == 0:
            raise InvalidInput(f"The model has no list of blocks named '{name}'.")
        return name, found
    candidates: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and _alike(module):
            inside_another = any(path.startswith(f"{outer}.") for outer in candidates)
            if not inside_another:
                candidates[path] = module
    if not candidates:
        raise InvalidInput(
            "The model has no list of equal blocks; name it with the option for blocks."
        )
    best = max(candidates, key=lambda path: len(candidates[path]))
    return best, candidates[best]


def _alike(modules: nn.ModuleList) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [isinstance(module, GradientCheckpointingLayer) for module in modules]
    return len({type(module) for module in modules}) == 1 or (len(layers) > 0 and all(layers))


def refuse_quantised(config: Any) -> None:
    """`InvalidInput` if a model's configuration says that its weights are quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    settings = found if isinstance(found, dict) else vars(found)
    if not settings.get("dequantize"):
        method = settings.get("quant_method", "by an unnamed method")
        raise InvalidInput(
            f"The model's weights are quantised ({getattr(method, 'value', method)}); "
            "give the model before quantisation."
        )


def prunable_layers(block: nn.Module, prefix: str) -> list[PrunableLayer]:
    """All linear layers of a block, experts included and routers not, in the order of its modules.

    Raises
    ------
    InvalidInput
        If a weight is quantised, computed from others, or shared by two layers.
    """
    from transformers.pytorch_utils import Conv1D

    routers = router_weights(block)
    layers: list[PrunableLayer] = []
    for name, module in block.named_modules():
        full = f"{prefix}.{name}" if name else prefix
        _check_plain(module, full)
        if isinstance(module, (nn.Linear, Conv1D)):
            if f"{name}.weight".lstrip(".") not in routers:
                layers.append(PrunableLayer(full, module))
        else:
            layers += [
                PrunableLayer(f"{weight.name}[{expert}]", module, weight, expert)
                for weight in fused_weights(module, full)
                for expert in range(len(weight))
            ]
    _check_own(layers)
    return layers


def all_layers(blocks_name: str, blocks: nn.ModuleList) -> list[PrunableLayer]:
    """The prunable layers of all blocks, in order."""
    return [
        layer
        for index, block in enumerate(blocks)
        for layer in prunable_layers(block, f"{blocks_name}.{index}")
    ]


def _check_plain(module: nn.Module, name: str) -> None:
    """Refuse weights that are no plain floating-point tensors."""
    linear = isinstance(module, nn.Linear)
    if hasattr(module, "parametrizations") or (linear and "weight" not in module._parameters):
        raise InvalidInput(
            f"Layer {name} computes its weights from other parameters; "
            "remove its parametrisation first."
        )
    for key, value in chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    ):
        if value.ndim < 2:
            continue
        known = type(value) in (Tensor, nn.Parameter)
        plain = value.is_floating_point() and value.element_size() > 1
        # Buffers may be masks (bool) or positions (int64).
        if isinstance(value, nn.Parameter):
            allowed = known and plain
        else:
            allowed = plain or value.dtype in (torch.bool, torch.int64)
        if not allowed:
            kind = value.dtype if known else type(value).__name__
            raise InvalidInput(
                f"Layer {name} has weights of type {kind} ({key}); "
                "give the model before quantisation."
            )


def _check_own(layers: Sequence[PrunableLayer]) -> None:
    """Refuse two layers with one weight."""
    seen: dict[tuple[Any, ...], str] = {}
    for layer in layers:
        key = (*_place(layer.parameter), layer.expert)
        if key in seen:
            raise InvalidInput(
                f"Layers {seen[key]} and {layer.name} share one weight, "
                "which pruning layer by layer cannot do."
            )
        seen[key] = layer.name


@dataclass(frozen=True)
class Coverage:
    """How many of the block weights (matrices and larger, no biases) are prunable.

    Attributes
    ----------
    prunable, total
        Numbers of weights.
    routers
        Of the rest, those that route tokens to experts; they stay dense.
    uncovered
        Names of the parameters that are neither.
    """

    prunable: int
    total: int
    routers: int = 0
    uncovered: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Prunable share, 0 to 1."""
        return self.prunable / self.total if self.total else 0.0


def coverage(blocks_name: str, blocks: nn.ModuleList, model: nn.Module | None = None) -> Coverage:
    """Coverage over all blocks.

    Parameters
    ----------
    blocks_name, blocks
        From `find_blocks`.
    model
        The whole model, to see whether a part outside the blocks shares a weight with them.

    Raises
    ------
    InvalidInput
        If nothing can be pruned, or a weight is shared.
    """
    layers = [
        layer
        for i, block in enumerate(blocks)
        for layer in prunable_layers(block, f"{blocks_name}.{i}")
    ]
    if not layers:
        raise InvalidInput(
            f"The blocks {blocks_name} hold no linear layer (nn.Linear, Conv1D or fused experts) "
            "to prune."
        )
    _check_own(layers)
    if model is not None:
        owners = {_place(layer.parameter): layer.name for layer in layers}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not name.startswith(f"{blocks_name}.") and _place(parameter) in owners:
                raise InvalidInput(
                    f"Layer {owners[_place(parameter)]} shares its weight with {name}, which is "
                    "no layer of a block; untie them first."
                )
    covered = {_place(layer.parameter) for layer in layers}
    total = routers = 0
    uncovered = []
    for i, block in enumerate(blocks):
        routing = router_weights(block)
        for name, parameter in block.named_parameters():
            if parameter.ndim < 2 or "bias" in name.rpartition(".")[2]:
                continue
            total += parameter.numel()
            if name in routing:
                routers += parameter.numel()
            elif _place(parameter) not in covered:
                uncovered.append(f"{blocks_name}.{i}.{name}")
    prunable = sum(layer.weight.numel() for layer in layers)
    return Coverage(prunable, total, routers, tuple(uncovered))


def _place(parameter: Tensor) -> tuple[Any, ...]:
    """Where a parameter lies; without storage (meta), the object itself."""
    return (parameter.device, parameter.data_ptr() or id(parameter))
