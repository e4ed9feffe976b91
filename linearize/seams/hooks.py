"""Every private name of accelerate, diffusers' hooks and peft, in one file: what replaces a module's forward, LoRA's
switch."""

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

    Hooks of accelerate and diffusers keep the inner forward and look it up at every call, so they are given the new
    class's; what a removed hook leaves behind is taken away. Raises Unsupported naming whoever else replaced the
    forward.
    """
    outer = module.__dict__.get("forward")
    owner = getattr(getattr(outer, "func", outer), "__module__", None) or "unknown code"
    keeper, key = _keeper(module, owner)
    inner = outer if keeper is None else keeper[key]
    if inner is not None:
        function = getattr(inner, "__func__", None)
        if function is None or not any(vars(cls).get("forward") is function for cls in type(module).__mro__):
            owner = owner if keeper is None else getattr(inner, "__module__", None) or owner
            raise Unsupported(
                f"{name}: its forward was replaced on the instance (by {owner}), so surgery would silently do nothing; "
                "remove that hook, attach, then put the hook back"
            )
        if keeper is None:
            del module.__dict__["forward"]
    try:
        yield
    finally:
        if keeper is not None:
            keeper[key] = type(module).forward.__get__(module)


def _keeper(module: nn.Module, owner: str) -> tuple[dict[str, Any] | None, str]:
    """Where a hook keeps the forward that it wraps: (dict, key); (None, "") where none does."""
    if owner == "accelerate.hooks" and "_old_forward" in module.__dict__:
        return module.__dict__, "_old_forward"
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", None)
    if owner == "diffusers.hooks.hooks" and references:
        first = vars(references[0])  # the innermost of a chain
        return first, "forward" if first["original_forward"] is None else "original_forward"
    return None, ""


def value(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer of `module` itself, also where offloading keeps it elsewhere."""
    tensor = getattr(module, name)
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    return kept[name] if tensor.device.type == "meta" and kept is not None else tensor


def device(module: nn.Module) -> torch.device:
    """Where `module` computes: its weights' device, or the one that offloading hooks bring them to; else meta."""
    for part in module.modules():
        found = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if found is not None:
            return torch.device(found)
    weights = [p for p in module.parameters() if p.device.type != "meta"]
    return weights[0].device if weights else torch.device("meta")


def dtype(model: nn.Module) -> torch.dtype | None:
    """What `model` computes in: what casting hooks say, or its first weights of two bytes or more."""
    for module in model.modules():
        for hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values():
            if isinstance(found := getattr(hook, "compute_dtype", None), torch.dtype):
                return found
    weights = (p.dtype for p in model.parameters())
    return next((d for d in weights if d.is_floating_point and d.itemsize > 1), None)


def lora_choose(layer: Any, names: list[str]) -> None:
    """Which LoRAs of a layer act; set_adapter() would also touch requires_grad."""
    layer._active_adapter = names


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


def lora_forget(model: nn.Module) -> None:
    """Take away what says that `model` has a LoRA, once no layer of it has one."""
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)
