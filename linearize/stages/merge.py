"""Fold LoRA into the weights it stands beside: W + scale B A, computed in float32, rounded once to W's own dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linearize.surgery.attach import Surgery
from linearize.surgery.plugin import lora_forget
from linearize.surgery.port import LINEAR
from linearize.types import Unsupported


def merge(model: nn.Module | Surgery) -> list[str]:
    """Merge every LoRA layer of `model` in place and take peft's wrappers out; returns the names of the merged layers.

    Mixers are untouched. Raises Unsupported, before anything is changed, where a layer cannot be merged exactly
    (quantised, fused, or not a plain linear layer).
    """
    model = model.model if isinstance(model, Surgery) else model
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    _refuse_fused(model)
    for name, layer in layers.items():
        _refuse(name, layer)
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if not layer.merged:
            with torch.no_grad():
                base.weight.copy_(merged_weight(layer))
        parent, _, child = name.rpartition(".")
        base.train(layer.training)
        setattr(model.get_submodule(parent), child, base)
    if layers:
        lora_forget(model)
    return list(layers)


def merged_weight(layer: Any) -> Tensor:
    """The merged weight of one LoRA layer of peft, float32 (float64 stays), in the layout of its base."""
    weight = layer.get_base_layer().weight
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for name in layer.active_adapters:
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight.to(total), layer.lora_B[name].weight.to(total)
            delta = layer.scaling[name] * (b @ a)
            total = total + (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)
    return total


def _refuse(name: str, layer: Any) -> None:
    """Raises Unsupported where `merged_weight` would not be the whole truth about this layer."""
    base = layer.get_base_layer()
    if type(base) not in LINEAR or not base.weight.is_floating_point():
        raise Unsupported(
            f"{name}: LoRA beside a {type(base).__module__}.{type(base).__name__} cannot be merged exactly (quantised "
            "or custom weights): load the base un-quantised, put the adapter on it and merge there, or keep the adapter"
        )
    if base.weight.device.type == "meta":
        raise Unsupported(f"{name}: its weight is offloaded; load the model without offloading, then merge")
    if variants := [k for k, v in getattr(layer, "use_dora", {}).items() if v]:
        raise Unsupported(f"{name}: adapter {variants[0]!r} is DoRA, which is no sum of two weights: keep the adapter")
    if any(getattr(layer, "lora_bias", {}).values()):
        raise Unsupported(f"{name}: its LoRA has a bias of its own, which is not merged: train with lora_bias=False")


def _refuse_fused(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False):
            raise Unsupported(
                f"{name}: its projections are fused, which drops LoRA: call unfuse_qkv_projections() first"
            )
