"""A model opened for a run as its size asks for: whole in memory, or read block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .folder import ModelFolder, NotStreamable, build_empty
from .models import DType, ModelDescription, describe_model, load_model, resolve_device
from .placement import FromFolder, FromHost, Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MOST_OF_MEMORY = 0.5
"""A model that would take a larger share of the available host memory is read block by block."""


@dataclass(frozen=True)
class OpenedModel:
    """A model to prune, wherever its weights are.

    Attributes
    ----------
    placement
        Holds the model.
    tokenizer
        Its tokenizer.
    stored_dtype
        Type that the weights are stored in.
    """

    placement: Placement
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype

    @property
    def model(self) -> PreTrainedModel:
        """The model; its parameters may be on the meta device."""
        return self.placement.model


@dataclass(frozen=True)
class Source:
    """A model by its name, and how it is read.

    Attributes
    ----------
    model, dtype, trust_remote_code
        As of `load_model`.
    device
        auto, cpu, cuda or cuda:N.
    stream
        Whether weights are read from the folder block by block, and never all held; None does
        so for models that would take more than half of the available host memory.
    blocks
        Name of the module list of blocks, where it is not found by itself.
    """

    model: str
    device: str = "auto"
    dtype: DType = "auto"
    trust_remote_code: bool = False
    stream: bool | None = None
    blocks: str | None = None

    def open(
        self, device: torch.device | None = None, warn: Callable[[str], None] = lambda _: None
    ) -> OpenedModel:
        """Open the model for a run that needs one block at a time.

        Parameters
        ----------
        device
            Where blocks are run; None for the one that `device` names.
        warn
            Told if a large model has to be held in memory as a whole.

        Raises
        ------
        InvalidInput
            If there is no such model, or its weights cannot be streamed though asked for.
        """
        device = device or resolve_device(self.device)
        if self.stream is not False:
            try:
                described = describe_model(self.model, self.dtype, self.trust_remote_code)
                opened = _open_streamed(described, device, self.stream is None, self.blocks)
            except NotStreamable as error:
                if self.stream:
                    raise NotStreamable(
                        f"{error} Give --no-stream (in Python: stream=False) to hold the whole "
                        "model in memory."
                    ) from error
                warn(f"{error} The whole model is loaded into memory.")
                opened = None
            if opened is not None:
                return opened
        host = torch.device("cpu")
        loaded = load_model(self.model, device, self.dtype, self.trust_remote_code, at=host)
        placement = (
            FromHost(loaded.model, device, self.blocks)
            if device.type == "cuda"
            else Placement(loaded.model, self.blocks)
        )
        return OpenedModel(placement, loaded.tokenizer, loaded.stored_dtype)


def _open_streamed(
    described: ModelDescription, device: torch.device, only_if_large: bool, blocks: str | None
) -> OpenedModel | None:
    model = build_empty(described.config, described.dtype or torch.float32)
    size = sum(parameter.nbytes for parameter in model.parameters())
    if only_if_large and size < _MOST_OF_MEMORY * available_memory():
        return None
    folder = ModelFolder(local_folder(described.path), model)
    stored = folder.dtype(folder.names[0])
    wanted = described.dtype or (torch.float32 if device.type == "cpu" else stored)
    return OpenedModel(
        FromFolder(model, folder, device, wanted, blocks), described.tokenizer, stored
    )


def local_folder(path: str) -> Path:
    """A model's folder; one on the hub is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def available_memory() -> float:
    """Bytes of host memory that can be had without swapping; infinite where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
