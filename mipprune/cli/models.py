"""Models that a command reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from solvers import InvalidInput

from . import terminal
from .terminal import quiet_transformers

if TYPE_CHECKING:
    from ..models import LoadedModel


def load(model: str, device: str, dtype: str, trust_remote_code: bool) -> LoadedModel:
    """A model, with a word about what is going on."""
    from ..models import load_model, resolve_device

    quiet_transformers()
    with terminal.err.status(f"Reading {model}"):
        return load_model(model, resolve_device(device), dtype, trust_remote_code)  # type: ignore[arg-type]


def load_tokenizer(model: str) -> tuple[Any, Any]:
    """Configuration and tokenizer of a model, without its weights."""
    from transformers import AutoConfig, AutoTokenizer

    from ..embedded import MODEL_NAME, MODEL_PATH

    quiet_transformers()
    path = str(MODEL_PATH) if model == MODEL_NAME else str(Path(model).expanduser())
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return config, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"The tokenizer of '{model}' cannot be read: {reason}") from error
