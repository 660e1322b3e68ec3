"""Random models of given shapes, written to disk one block at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "1b": {  # TinyLlama-1.1B
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "8b": {  # Llama-3.1-8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Sizes of Llama models."""


def write_llama(folder: Path, shape: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write a random Llama model with the embedded model's tokenizer; its number of weights.

    Weights are normal with the usual standard deviation of 0.02, but for norms, which are 1.
    """
    from transformers import AutoTokenizer, LlamaConfig

    from mipprune.checkpoint import Shards
    from mipprune.embedded import MODEL_PATH
    from mipprune.folder import build_empty

    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=131072, tie_word_embeddings=False, dtype=dtype
    )
    model = build_empty(config, dtype)
    blocks = config.num_hidden_layers
    shards = Shards(folder, blocks + 1)
    random = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)

    def drawn(names: list[str]) -> dict[str, Tensor]:
        tensors = {}
        for name in names:
            shape = model.get_parameter(name).shape
            one = torch.ones(shape) if len(shape) == 1 else torch.empty(shape)
            tensors[name] = (one if len(shape) == 1 else one.normal_(0, 0.02, generator=random)).to(
                dtype
            )
        return tensors

    names = [name for name, _ in model.named_parameters()]
    for index in range(blocks):
        shards.write(index, drawn([n for n in names if n.startswith(f"model.layers.{index}.")]))
    shards.write(blocks, drawn([n for n in names if not n.startswith("model.layers.")]))
    shards.write_index()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def peak_memory() -> int:
    """Most bytes of host memory that this process has had."""
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def last_line(output: str) -> dict[str, Any]:
    """The JSON record in the last line of a process's output."""
    record: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return record
