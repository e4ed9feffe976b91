"""Every name of transformers that is not its public face, in one file: the rest of the house imports from here.

Checked with transformers 5.17 and 5.23. Only `cache.layers`, `layer_class_to_replicate` and the abstract methods of
CacheLayerMixin are relied on in caches.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from linearize.types import Unsupported

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EncoderDecoderCache",
    "PreTrainedModel",
    "StaticLayer",
    "attention_function",
    "auto_class",
    "base_classes",
    "bidirectional_mask_function",
    "causal_mask_function",
    "chunked_delta_rule",
    "get_implementation",
    "keeping",
    "lightning_attention",
    "mapped",
    "masks",
    "named",
    "register_subclass",
    "set_implementation",
]


def get_implementation(config: Any) -> str:
    """The attention implementation a config names: "sdpa", "eager", ..."""
    return config._attn_implementation or "eager"


def set_implementation(config: Any, name: str) -> None:
    """Name the attention implementation without transformers' checks (which know only their own)."""
    config._attn_implementation_internal = name


def attention_function(cls: type[nn.Module], name: str) -> Callable[..., Any]:
    """The function a family calls for implementation `name`; "eager" is the one of its own file."""
    eager = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


@functools.cache
def masks(cls: type[nn.Module]) -> str | None:
    """Which masks this class's own forward makes: "causal", "bidirectional", "both"; None where it makes none."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    made = [n for n in getattr(code, "co_names", ()) if re.fullmatch(r"create_\w*mask\w*", n)]
    kinds = {"causal" if "causal" in n else "bidirectional" for n in made if "causal" in n or "bidirectional" in n}
    return "both" if len(kinds) == 2 else next(iter(kinds), None)


def auto_class(config: type[Any], model: type[PreTrainedModel]) -> type[Any]:
    """The auto class that makes `model` from its configuration (AutoModelForCausalLM, AutoModel, ...).

    Raises Unsupported where transformers has none.
    """
    import transformers

    for name in ("AutoModelForCausalLM", "AutoModel", *sorted(n for n in dir(transformers) if n.startswith("Auto"))):
        auto = getattr(transformers, name)
        if model in mapped(auto, config):
            return auto
    raise Unsupported(f"transformers has no auto class for {model.__name__}: save an adapter")


def named(name: str | None) -> Any:
    """The class of transformers called so, or None."""
    import transformers

    return getattr(transformers, name, None) if name else None


def mapped(auto: type[Any], config: type[Any]) -> tuple[type[Any], ...]:
    """The model classes that an auto class knows for a configuration class."""
    found: Any = getattr(auto, "_model_mapping", None)
    made = found.get(config, None) if hasattr(found, "get") else None
    return made if isinstance(made, tuple) else () if made is None else (made,)


def base_classes(model_type: str, architecture: str) -> tuple[type[Any], type[PreTrainedModel]] | None:
    """(configuration class, model class) of transformers' own code; None where it has none of these names."""
    model = named(architecture)
    if model_type not in CONFIG_MAPPING or model is None:
        return None
    return CONFIG_MAPPING[model_type], model


def keeping(base: type[PreTrainedModel], child: str, apart: type[nn.Module]) -> type[Any]:
    """A subclass of `base` that leaves modules of class `apart`, children called `child`, alone: they stay float32
    under bf16, out of quantisation, and as their own code (or the file) has them."""

    class Keeping(base):  # type: ignore[misc, valid-type]
        # The first holds them out of quantisation (as a pattern), the second holds them at float32 under bf16.
        _keep_in_fp32_modules = [*(base._keep_in_fp32_modules or []), f".*{child}"]
        _keep_in_fp32_modules_strict = [*(base._keep_in_fp32_modules_strict or []), child]

        def _init_weights(self, module: nn.Module) -> None:
            kept = (m for m in self.modules() if isinstance(m, apart))
            if not any(module is part for owner in kept for part in owner.modules()):
                super()._init_weights(module)

    return Keeping


def register_subclass(
    config: type[Any], model: type[PreTrainedModel], base: type[PreTrainedModel], base_type: str
) -> None:
    """Make a subclass pair known to the auto classes of this process (idempotent). Raises Unsupported where `base` is
    known to none.

    Checkpoints of some families are laid out differently on disk than in memory (experts one by one, or stacked); the
    conversion goes by class name or model type, so the subclass inherits it under its own.
    """
    AutoConfig.register(config.model_type, config, exist_ok=True)
    auto_class(base.config_class, base).register(config, model, exist_ok=True)
    for new, old in ((config.model_type, base_type), (model.__name__, base.__name__)):
        mapping = get_checkpoint_conversion_mapping(old)
        if mapping is not None:
            register_checkpoint_conversion_mapping(new, deepcopy(mapping), overwrite=True)


# ------------------------------------------------------------------------------------------------- peers of benchmarks
def chunked_delta_rule() -> Callable[..., Any]:
    """Qwen3-Next's linear attention without a kernel. Raises ImportError where transformers has it no more."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule


def lightning_attention(heads: int, dim: int) -> Any:
    """MiniMax's linear layer, the first of two. Raises ImportError where transformers has it no more."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=heads * dim, num_attention_heads=heads, head_dim=dim, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return MiniMaxLightningAttention(config, 0)
