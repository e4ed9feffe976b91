"""The torch seam: modules that call `F.scaled_dot_product_attention` themselves (falcon, data2vec-vision, diffusers).

Inside one module's forward the call is redirected to the module's port; the module's own code stays untouched.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SDPA = "scaled_dot_product_attention"


class Redirect(TorchFunctionMode):
    """While active, F.scaled_dot_product_attention goes to `answer(query, key, value, attn_mask, scale=...)`."""

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            if func is torch.Tensor.unflatten:  # a method that torch.compile cannot trace from inside a mode
                func = torch.unflatten
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        call: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        return self.answer(call.pop("query"), call.pop("key"), call.pop("value"), call.pop("attn_mask", None), **call)


def reaches(cls: type[nn.Module]) -> bool:
    """Whether this class's own forward names scaled_dot_product_attention."""
    return _mentions(cls, lambda name: name == _SDPA)


def writes_softmax(cls: type[nn.Module]) -> bool:
    """Whether this class's own code computes a softmax: attention written by hand, out of reach."""
    return _mentions(cls, lambda name: name == "softmax")


def _mentions(cls: type[nn.Module], matches: Callable[[str], bool]) -> bool:
    forward: Any = cls.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    own = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    functions = [forward, *own]
    return any(
        isinstance(step.argval, str) and matches(step.argval)
        for f in functions
        if hasattr(f, "__code__")
        for step in dis.get_instructions(f)
    )
