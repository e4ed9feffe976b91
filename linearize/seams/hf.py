"""Every name of transformers that is not its public face, in one file: the rest of the house imports from here.

Checked with transformers 5.17 and 5.23. Only `cache.layers`, `layer_class_to_replicate` and the abstract methods of
CacheLayerMixin are relied on in caches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache, StaticLayer
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "EncoderDecoderCache",
    "PreTrainedModel",
    "StaticLayer",
    "attention_function",
    "causal_mask_function",
    "get_implementation",
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
