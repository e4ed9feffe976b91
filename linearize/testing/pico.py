"""Two-layer random models of every family, built on the spot: laws and parity, never quality."""

from __future__ import annotations

from typing import Any

import torch

#: model_type -> what its config needs beyond the common sizes (...: a common one it does not take). A new family is
#: one row.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": "sliding/full"},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "layer_types": "sliding/full"},
    "cohere2": {"sliding_window": 6, "layer_types": "sliding/full"},
    "stablelm": {"partial_rotary_factor": 0.5},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "layer_types": "full/full"},
    "starcoder2": {"sliding_window": None},
    "gpt_oss": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 6,
        "layer_types": "sliding/full",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 128},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "falcon": {"alibi": False, "num_kv_heads": 2, "new_decoder_architecture": True, "head_dim": ...},
}

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "dropout": 0.0,
    "hidden_dropout": 0.0,
}


def pico_config(family: str, **overrides: Any) -> Any:
    """The tiny config of `family`: 4 layers, 4 heads of 8 (2 key/value heads where it has them), 97 pieces."""
    from transformers import AutoConfig

    settings = {k: v for k, v in {**_COMMON, **FAMILIES[family], **overrides}.items() if v is not ...}
    if isinstance(kinds := settings.get("layer_types"), str):
        names = [f"{k}_attention" for k in kinds.split("/")]
        settings["layer_types"] = [names[i % len(names)] for i in range(settings["num_hidden_layers"])]
    return AutoConfig.for_model(family, **settings)


def pico(family: str, seed: int = 0, sharpen: float = 6.0, **overrides: Any) -> torch.nn.Module:
    """A random causal language model of `family` in eval mode, float32.

    Query and key projections are scaled by `sharpen` so that attention is far from uniform: on flat attention every
    mixer looks right.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(pico_config(family, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj")):
                parameter.mul_(sharpen)
            elif parameter.ndim == 2 and any(part in name for part in ("c_attn", "qkv", "query_key_value")):
                parameter.mul_(sharpen / 2)
    return model
