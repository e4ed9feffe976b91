"""A second model on the same weights: what a zero-token baseline is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from linearize.seams import hooks
from linearize.surgery.attach import Surgery, attach


def twin(model: nn.Module, method: str, config: Mapping[str, Any] | None = None, sites: Any = None) -> nn.Module:
    """The teacher behind `model` with an untrained `method` attached, as a module of its own that shares every
    parameter with `model` (no memory, and the conversion of `model` stays as it is): what a zero-token baseline is.

    LoRA, where injected, is off in it. sites: those of `model`'s conversion, else all.
    """
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    made = copy.deepcopy(model, shared)  # the memo makes deepcopy hand the tensors through
    hooks.lora_off(made)
    earlier = Surgery.of(made)
    if earlier is not None:
        sites = earlier.sites if sites is None else sites
        earlier.detach()
    attach(made, sites, method, dict(config or {}))
    return made.eval()
