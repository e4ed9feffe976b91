"""Plug-ins on disk: what a method (and a LoRA trained along) brought into a diffusion model, and how its base is known
again. Everything of it is one safetensors file and one json.

A whole model, whose base was trained as well, is the same json and all weights under a name that diffusers does not
look for: loaded by diffusers alone it would be a softmax model, silently wrong.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.mixers.base import MixerConfig
from linearize.seams import hooks
from linearize.seams.dit_inputs import small_inputs
from linearize.seams.hooks import lora_forget
from linearize.storage import write_atomic
from linearize.surgery.attach import Surgery
from linearize.surgery.port import CHILD
from linearize.types import InputError, StorageError, Unsupported

log = logging.getLogger("linearize")

#: of linearize_config.json in a plug-in's folder; a newer one is refused. 2: with LoRA, NTK; whole models.
FORMAT = 2
CONFIG, WEIGHTS, WHOLE = "linearize_config.json", "plugin.safetensors", "model.safetensors"
#: relative L2 distance of a base's answers on stored noise: the same weights in another precision, and anything else
SAME, COPY = 0.05, 0.25
#: what of a LoRA's settings its tensors need to be put back
_LORA = ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern")


def named(part: str, name: str) -> str:
    """A tensor or layer of a component; "" is a model that stands alone."""
    return f"{part}.{name}" if part else name


def own(surgery: Surgery) -> dict[str, tuple[nn.Module, str]]:
    """tensor name -> (module, its name there) of what the method brought along."""
    return {
        f"{name}.{CHILD}.{part}.{key}".replace("..", "."): (module, key)
        for name, mixer in surgery.mixers.items()
        for part, module in mixer.named_modules()
        for key in (*module._parameters, *module._buffers)
        if getattr(module, key) is not None
    }


def base_name(model: Any) -> str | None:
    """The name that a model was loaded by."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if name and not Path(name).is_absolute() else None


# ----------------------------------------------------------------------------------------------------------------- LoRA
def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Layers that carry a LoRA of this name."""
    return {n: m for n, m in model.named_modules() if adapter in getattr(m, "lora_A", {})}


def lora_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Its tensors, by their names in the model."""
    return {
        f"{name}.{kind}.{adapter}.weight": getattr(layer, kind)[adapter].weight
        for name, layer in lora_layers(model, adapter).items()
        for kind in ("lora_A", "lora_B")
    }


def lora_settings(model: Any, adapter: str) -> dict[str, Any]:
    """What it takes to put it back. Raises InputError where there is none of this name, Unsupported for DoRA."""
    layers = lora_layers(model, adapter)
    if not layers:
        known = sorted({name for m in model.modules() for name in getattr(m, "lora_A", {})})
        raise InputError(f"no LoRA is called {adapter!r} here; there is {', '.join(known) or 'none'}")
    raw = model.peft_config[adapter].to_dict()
    if raw.get("use_dora"):
        raise Unsupported(f"LoRA {adapter!r} is DoRA, which is not kept with a plug-in: save it as the pipeline does")
    kept = {key: raw[key] for key in _LORA if raw.get(key)}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in kept.items()} | {"target_modules": sorted(layers)}


def eject_lora(model: Any, adapter: str) -> None:
    """Take a LoRA out: the layers that carried it alone are the plain ones they were."""
    for name, layer in lora_layers(model, adapter).items():
        others = [n for n in layer.active_adapters if n != adapter]
        layer.delete_adapter(adapter)
        hooks.lora_choose(layer, others)
        if not layer.lora_A:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    configs = model.__dict__.get("peft_config", {})
    configs.pop(adapter, None)
    if not configs:
        lora_forget(model)


# -------------------------------------------------------------------------------------------------------------- writing
def write(
    folder: Path,
    parts: Mapping[str, Surgery],
    method: str,
    settings: MixerConfig,
    *,
    lora: str | None = None,
    ntk: float | None = None,
    whole: bool = False,
) -> None:
    """The files, into a folder that the caller makes appear whole. lora: the name of one to keep along; ntk: said
    along. whole: all
    weights, LoRA merged into them. Raises InputError for what is no part of a plug-in."""
    from safetensors.torch import save

    if not whole and any(mixer.starts_afresh for surgery in parts.values() for mixer in surgery.mixers.values()):
        raise InputError("projections that started afresh are no part of a plug-in: set start: inherit")
    tensors = {
        named(part, name): hooks.value(*place) for part, s in parts.items() for name, place in own(s).items()
    }  # fmt: skip
    components: dict[str, Any] = {}
    for part, surgery in parts.items():
        model: Any = surgery.model
        components[part] = {
            "class": type(model).__name__,
            "base": base_name(model),
            "sites": list(surgery.mixers),
            "answers": answers(model),
        }
        if whole:
            tensors |= {named(part, name): tensor for name, tensor in model.state_dict().items()}
            components[part]["config"] = {k: v for k, v in dict(model.config).items() if k != "_name_or_path"}
        elif lora is not None:
            components[part]["lora"] = lora_settings(model, lora)
            tensors |= {named(part, name): tensor for name, tensor in lora_tensors(model, lora).items()}
    said = {
        "format": FORMAT if whole or lora or ntk else 1,
        "version": linearize.__version__,
        "method": method,
        "mixer": settings.model_dump(mode="json"),
        **({"lora": lora} if lora else {}),
        **({"ntk": ntk} if ntk else {}),
        "components": components,
    }
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomic(folder / (WHOLE if whole else WEIGHTS), save(kept, {"format": "pt"}))
    write_atomic(folder / CONFIG, json.dumps(said, indent=1, default=list) + "\n")


# -------------------------------------------------------------------------------------------------------------- reading
def read(folder: Path) -> dict[str, Any]:
    """What linearize_config.json says. Raises InputError, StorageError, Unsupported for a newer format."""
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        newer = said["format"] > FORMAT
    except FileNotFoundError:
        raise InputError(f"{folder} is no plug-in of linearize: there is no {CONFIG} in it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{folder / CONFIG} is damaged ({error}): save or download it again") from None
    if newer:
        raise Unsupported(f"{folder} was written by linearize {said['version']}: pip install --upgrade linearize")
    return said


def is_one(folder: Path) -> bool:
    """Whether a folder holds what `write` wrote (an adapter of a transformers model has no components)."""
    try:
        return "components" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def tensors_of(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    """Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{folder / name} is damaged ({error}): save or download it again") from None


def fill(folder: Path, here: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy what a file holds into the places of the same names. Raises StorageError where they are not the same."""
    if odd := here.keys() ^ tensors.keys():
        raise StorageError(f"{folder}: {min(odd)} is there or here alone: it was damaged or edited")
    for name, tensor in here.items():
        if tensor.shape != tensors[name].shape:
            raise StorageError(f"{folder}: {name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        with torch.no_grad():
            tensor.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------- knowing a base again
def answers(model: nn.Module) -> list[float]:
    """64 numbers of what a model makes of stored noise at its own softmax, without LoRA: how it is known again."""
    inputs = small_inputs(model, (4, 4), dtype=hooks.dtype(model), device=hooks.device(model))
    if inputs is None:
        raise Unsupported(f"{type(model).__name__} cannot be known again: see seams/dit_inputs.py")
    surgery, training = Surgery.of(model), model.training
    layers = hooks.lora_off(model)
    model.eval()
    try:
        with torch.no_grad(), surgery.teacher() if surgery else contextlib.nullcontext():
            out = model(**inputs, return_dict=False)[0]
    finally:
        model.train(training)
        hooks.lora_on(layers)
    flat = (out[0] if isinstance(out, list) else out).flatten().float().cpu()
    return [float(f"{x:.5g}") for x in flat[:: max(1, len(flat) // 64)][:64].tolist()]


def recognise(folder: Path, model: nn.Module, there: Mapping[str, Any]) -> None:
    """Raises InputError where `model` is not the base that a plug-in was made for."""
    wanted = there["base"] or f"another {there['class']}"
    refused = f"{folder} was made for {wanted}, not for this {type(model).__name__}"
    if type(model).__name__ != there["class"]:
        raise InputError(f"{refused}: that is a {there['class']}")
    here, known = torch.tensor(answers(model)), torch.tensor(there["answers"])
    apart = float((here - known).norm() / known.norm()) if here.shape == known.shape else math.inf
    if not apart <= COPY:
        raise InputError(
            f"{refused}: on the same noise its answers differ by {apart:.0%} (at most {COPY:.0%} in a copy)"
        )
    if apart > SAME:
        log.warning(
            "%s was made for %s, whose answers differ by %.0f %%: fine for a 4-bit copy", folder, wanted, 100 * apart
        )
