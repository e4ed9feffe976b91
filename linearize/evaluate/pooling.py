"""From token features to one vector per text, as the model's folder says it: sentence-transformers' modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.types import InputError, StorageError, Unsupported

#: keys of 1_Pooling/config.json, in the order in which their vectors are joined
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": torch.nn.functional.gelu,
    "Identity": lambda x: x,
}


@dataclass(frozen=True)
class Pooling:
    """modes: how tokens become one vector (several are joined); then `steps`, in order. All in float32.

    notes: what a user may not have expected.
    """

    modes: tuple[str, ...] = ("mean",)
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: str | Path, revision: str | None = None) -> Pooling:
        """What modules.json of a folder or hub id says; the mean of the tokens where there is none.

        Raises InputError for a broken file, Unsupported for a module that is not understood.
        """
        try:
            listed = _file(model, "modules.json", revision)
        except ConnectionError:
            return cls(
                notes=(f"no modules.json of {model} at hand, and the hub cannot be reached: tokens are averaged",)
            )
        if listed is None:
            return cls(notes=("the model has no modules.json: a text's vector is the mean of its tokens",))
        modes, steps = ("mean",), []
        for module in _json(listed):
            kind, path = module["type"].rpartition(".")[2], module.get("path", "")
            if kind == "Pooling":
                modes = _modes(_json(_needed(model, f"{path}/config.json", revision)))
            elif kind == "Normalize":
                steps.append(_normalize)
            elif kind == "Dense":
                steps.append(_dense(model, path, revision))
            elif kind not in ("Transformer", "Dropout"):
                raise Unsupported(
                    f"module {kind!r} of {model}/modules.json is not known: pool without it by removing it"
                )
        return cls(modes, tuple(steps))

    def __call__(self, hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """float32 [B, E]; mask True at real tokens."""
        hidden, mask = hidden_BTD.float(), mask_BT.to(hidden_BTD.device, torch.float32).unsqueeze(-1)
        vector = torch.cat([_pool(hidden, mask, mode) for mode in self.modes], -1)
        for step in self.steps:
            vector = step(vector)
        return vector


def _pool(hidden_BTD: Tensor, mask_BT1: Tensor, mode: str) -> Tensor:
    if mode == "max":
        return hidden_BTD.masked_fill(mask_BT1 == 0, -torch.inf).amax(1)
    place_BT1 = torch.arange(1, hidden_BTD.shape[1] + 1, device=hidden_BTD.device)[:, None] * mask_BT1
    if mode in ("cls", "lasttoken"):
        first, last = mask_BT1.argmax(1, keepdim=True), place_BT1.argmax(1, keepdim=True)
        return hidden_BTD.take_along_dim(first if mode == "cls" else last, 1)[:, 0]
    weight = place_BT1 if mode == "weightedmean" else mask_BT1
    total, count = (hidden_BTD * weight).sum(1), weight.sum(1)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def _normalize(vector_BE: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector_BE, dim=-1)


def _modes(settings: dict[str, Any]) -> tuple[str, ...]:
    named = settings.get("pooling_mode")  # newer files name them; older ones have a flag each
    modes = [named] if isinstance(named, str) else named or [m for key, m in _MODES.items() if settings.get(key)]
    if not modes or not set(modes) <= set(_MODES.values()):
        raise Unsupported(f"pooling {modes or settings} is not known: choose from {', '.join(_MODES.values())}")
    return tuple(modes)


def _dense(model: str | Path, path: str, revision: str | None) -> Callable[[Tensor], Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _json(_needed(model, f"{path}/config.json", revision))
    name = settings.get("activation_function", "Identity").rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise Unsupported(f"{model}/{path}: activation {name!r} is not known; choose from {', '.join(_ACTIVATIONS)}")
    file = _needed(model, f"{path}/model.safetensors", revision)
    try:
        weights = {key: value.float() for key, value in load_file(file).items()}
        weight, bias = weights["linear.weight"], weights.get("linear.bias")
    except (SafetensorError, OSError, KeyError) as error:
        raise StorageError(f"{file} is damaged ({error}): download it again") from None

    def apply(vector_BE: Tensor) -> Tensor:
        there = vector_BE.device
        line = torch.nn.functional.linear(vector_BE, weight.to(there), None if bias is None else bias.to(there))
        return _ACTIVATIONS[name](line)

    return apply


def _file(model: str | Path, name: str, revision: str | None) -> Path | None:
    """A file of a folder or hub repository; None where it has none. Raises ConnectionError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(model), name, revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ConnectionError from error


def _needed(model: str | Path, name: str, revision: str | None) -> Path:
    try:
        file = _file(model, name, revision)
    except ConnectionError:
        file = None
    if file is None:
        raise InputError(f"modules.json of {model} names {name}, which is not there: copy it beside the model")
    return file


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}): download it again") from None
