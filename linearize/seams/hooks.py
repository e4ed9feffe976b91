"""Every private name of accelerate and peft, in one file: hooks that replace a module's forward, and LoRA's switch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from linearize.types import Unsupported


@contextlib.contextmanager
def reclassing(name: str, module: nn.Module) -> Iterator[None]:
    """Around a change of class: a forward in the instance dict would make it silently useless.

    accelerate's hook looks its inner forward up at every call, so it is given the new class's; what a removed hook
    leaves behind is taken away. Raises Unsupported naming whoever else replaced the forward.
    """
    outer = module.__dict__.get("forward")
    owner = getattr(getattr(outer, "func", outer), "__module__", None) or "unknown code"
    hooked = owner == "accelerate.hooks" and "_old_forward" in module.__dict__
    inner = module.__dict__["_old_forward"] if hooked else outer
    if inner is not None:
        function = getattr(inner, "__func__", None)
        if function is None or not any(vars(cls).get("forward") is function for cls in type(module).__mro__):
            owner = getattr(inner, "__module__", None) or owner if hooked else owner
            raise Unsupported(
                f"{name}: its forward was replaced on the instance (by {owner}), so surgery would silently do nothing; "
                "remove that hook, attach, then put the hook back"
            )
        if not hooked:
            del module.__dict__["forward"]
    try:
        yield
    finally:
        if hooked:
            module.__dict__["_old_forward"] = type(module).forward.__get__(module)


def device(module: nn.Module) -> torch.device:
    """Where `module` computes: its weights' device, or the one that offloading hooks bring them to; else meta."""
    for part in module.modules():
        found = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
    weights = [p for p in module.parameters() if p.device.type != "meta"]
    return weights[0].device if weights else torch.device("meta")


def lora_off(model: nn.Module) -> list[Any]:
    """Switches off what LoRA is on in `model`; returns the modules, for `lora_on`."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "lora_A")]
    active = [m for m in layers if not m.disable_adapters]
    for layer in active:
        layer._disable_adapters = True  # peft's own flag; enable_adapters() would also touch requires_grad
    return active


def lora_on(layers: list[Any]) -> None:
    for layer in layers:
        layer._disable_adapters = False
