"""Two-layer random models of every family, built on the spot: laws and parity, never quality."""

from __future__ import annotations

import re
from typing import Any

import torch

_SPECIAL = {"cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 4}
_SIDE = {"layers": 4, "attention_heads": 4, "ffn_dim": 48}

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

#: the same for encoders of text, and for both sides of an encoder-decoder
TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "modernbert": {"sliding_window": 3, "layer_types": "sliding/full", **_SPECIAL},
    "electra": {"embedding_size": 32},
    "albert": {"embedding_size": 16},
    "xlm-roberta": {},
    "distilbert": {"dim": 32, "n_heads": 4, "n_layers": 4, "hidden_dim": 48},
    "nomic_bert": {"num_key_value_heads": 4},
    "eurobert": {"mask_token_id": 4},
    "clip_text_model": {},
    "t5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 4, "d_ff": 48, "decoder_start_token_id": 1},
    "bart": {
        **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in _SIDE.items()},
        "d_model": 32,
        "decoder_start_token_id": 1,
    },
}
#: and of images: 4 x 4 patches of 4 x 4 pixels
IMAGE_ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {},
    "deit": {},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 2},
    "dinov3_vit": {"num_register_tokens": 2, "layerscale_value": 1.0},
    "beit": {"use_relative_position_bias": True},
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "vit_mae": {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 48},
    "ijepa": {},
    "data2vec-vision": {"use_shared_relative_position_bias": True},
}

_ROPE = {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
_PACKED = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, **_ROPE}
_LATENT = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "num_layers": 2, "attention_head_dim": 16}
#: diffusion models: class in diffusers, and its configuration. The inputs of a forward are made in seams/dit_inputs.py.
DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("DiTTransformer2DModel", {**_LATENT, "num_embeds_ada_norm": 10, "norm_num_groups": 1}),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_LATENT, "caption_channels": 12, "cross_attention_dim": 32, "norm_num_groups": 1},
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_LATENT,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "out_channels": 4,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "flux": (
        "FluxTransformer2DModel",
        {**_PACKED, "joint_attention_dim": 12, "pooled_projection_dim": 8, "guidance_embeds": True},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            **_PACKED,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **_PACKED,
            "joint_attention_dim": 12,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            **{k: v for k, v in _LATENT.items() if k != "num_layers"},
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 12,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
    ),
    "qwenimage": (
        "QwenImageTransformer2DModel",
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 12, **_ROPE},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 12,
            "num_layers": 2,
            "attention_head_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 5,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 12,
            "freq_dim": 16,
            "ffn_dim": 48,
            "num_layers": 2,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 12,
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (40, 16, 16),
            "cap_feat_dim": 12,
        },
    ),
    "hunyuandit": (
        "HunyuanDiT2DModel",
        {
            **_LATENT,
            "hidden_size": 32,
            "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 8,
            "text_len": 3,
            "text_len_t5": 4,
        },
    ),
    "zimage": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 16, 16],
        },
    ),
    "unet": (
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
        },
    ),
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
_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}


def pico_config(family: str, **overrides: Any) -> Any:
    """The tiny config of `family`: 4 layers, 4 heads of 8 (2 key/value heads where it has them), 97 pieces."""
    from transformers import AutoConfig

    common = _IMAGE if family in IMAGE_ENCODERS else _COMMON
    own = {**FAMILIES, **TEXT_ENCODERS, **IMAGE_ENCODERS}[family]
    settings = {k: v for k, v in {**common, **own, **overrides}.items() if v is not ...}
    if isinstance(kinds := settings.get("layer_types"), str):
        names = [f"{k}_attention" for k in kinds.split("/")]
        settings["layer_types"] = [names[i % len(names)] for i in range(settings["num_hidden_layers"])]
    return AutoConfig.for_model(family, **settings)


def pico(family: str, seed: int = 0, sharpen: float = 6.0, **overrides: Any) -> torch.nn.Module:
    """A random causal language model (or encoder without a head) of `family` in eval mode, float32.

    Query and key projections are scaled by `sharpen` so that attention is far from uniform: on flat attention every
    mixer looks right.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM if family in FAMILIES else AutoModel
    model = auto.from_config(pico_config(family, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in _QUERIES_AND_KEYS):
                parameter.mul_(sharpen)
            elif parameter.ndim == 2 and any(part in name for part in ("c_attn", "qkv", "query_key_value")):
                parameter.mul_(sharpen / 2)
            elif "relative_position_bias" in name:  # starts at zero, where nobody would miss it
                parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def pico_diffusion(family: str, seed: int = 0, sharpen: float = 6.0, **overrides: Any) -> torch.nn.Module:
    """A random diffusion model of `family` in eval mode, float32: 2 heads of 16 (8 in the UNet), sharp as `pico`'s.

    Zero-started outputs and gates are given weights, so that what attention computes is seen at the end.
    """
    import diffusers

    name, settings = DIFFUSION[family]
    heads = {} if {"n_heads", "block_out_channels"} & set(settings) else {"num_attention_heads": 2}
    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**{**heads, **settings, **overrides}).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 1e-6:
                parameter.normal_(std=0.2, generator=noise)
        for part, parameter in model.named_parameters():
            if parameter.ndim == 2 and re.search(r"to_q|to_k|add_[qk]_proj|to_qkv", part):
                parameter.mul_(sharpen)
    return model


_QUERIES_AND_KEYS = (
    *("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "query.", "key.", "q_lin", "k_lin"),
    *("Attention.q.", "Attention.k."),
)
