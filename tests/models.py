"""Tiny random models of many families."""

from __future__ import annotations

from typing import Any

import pytest
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
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
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
    "gpt_neo": {
        **{key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")},
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 64,
        "window_size": 8,
        "attention_types": [[["global", "local", "global"], 1]],
    },
    "gemma": {**GROUPED, "head_dim": 8},
    "granite": GROUPED,
    "glm4": {**GROUPED, "head_dim": 8},
    "smollm3": GROUPED,
    "ernie4_5": GROUPED,
    "olmo2": GROUPED,
    "mixtral": {**GROUPED, **EXPERTS},
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**GROUPED, **EXPERTS, "head_dim": 8},
    "olmoe": {**GROUPED, **EXPERTS},
    "granitemoe": {**GROUPED, **EXPERTS},
    "gpt_oss": {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": 8},
    "deepseek_v3": {
        **GROUPED,
        **EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "llama4_text": {
        **GROUPED,
        **EXPERTS,
        "head_dim": 8,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 16,
    },
    "jetmoe": {**GROUPED, **EXPERTS, "kv_channels": 8},
    "jamba": {
        **GROUPED,
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "nanochat": GROUPED,
    "gemma4_text": {
        **GROUPED,
        **EXPERTS,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "enable_moe_block": True,
        "top_k_experts": 2,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
    },
}
"""By family, after a space a variant."""

NEWER = {"nanochat", "gemma4_text"}
"""Model types that the oldest supported transformers lacks."""

MIXTURES = [family for family, settings in FAMILIES.items() if "num_experts_per_tok" in settings]


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of that family, in evaluation mode, float32; skips where there is none."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    kind = family.split()[0]
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = AutoConfig.for_model(kind, **{**FAMILIES[family], **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_tokens(windows: int = 5, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (windows, length), generator=generator)
