"""Tiny random models of many families."""

from __future__ import annotations

from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
GPT2 = {
    **{key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gpt2": GPT2,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2": GROUPED,
    "qwen2 sliding": {
        **GROUPED,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **GROUPED,
        "head_dim": 8,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {**GROUPED, "sliding_window": 8},
    "phi": {**SIZES, "intermediate_size": 48},
    "phi3": GROUPED,
    "gpt_neox": {**SIZES, "intermediate_size": 48},
    "bloom": {
        **{key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        "hidden_size": 32,
        "n_layer": 3,
        "n_head": 4,
    },
    "falcon": {**SIZES, "new_decoder_architecture": False},
}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model of that family, in evaluation mode, float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.split()[0], **FAMILIES[family])
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokens(windows: int = 5, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (windows, length), generator=generator)
