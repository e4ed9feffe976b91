"""The prompt as a file: what a converted model remembers of a text, kept, branched and continued bit-exactly.

    linearize.prefix(model, text, file="prompt.safetensors")
    cache = linearize.restore(model, "prompt.safetensors")              # in another process, or after a restart
    new = tokenizer(" And then", return_tensors="pt", add_special_tokens=False).input_ids
    model.generate(torch.cat([cache.prefix_ids, new], 1), past_key_values=cache)

A linear layer's state has a constant size; layers that stayed softmax keep their keys and values in the same file.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.seams import hf
from linearize.seams.cache import StateLayer, state_layer
from linearize.storage import write_atomic
from linearize.surgery.attach import Surgery
from linearize.types import InputError, StateSpec, StorageError, Unsupported

FORMAT = 1


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model remembers it. prefix_ids [B, T], attention_mask [B, T] (None: nothing is padding).

    digest: of the model's weights. state_version: of the mixers' state. Never used up: `restore` makes a new cache
    every time.
    """

    cache: hf.Cache
    prefix_ids: Tensor
    attention_mask: Tensor | None
    digest: str
    state_version: int

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered, ids not counted."""
        return sum(t.nbytes for tensors, _ in map(_describe, self.cache.layers) for t in tensors.values())

    def save(self, file: str | Path) -> None:
        """Write it as safetensors, whole or not at all. Raises StorageError."""
        from safetensors.torch import save as to_bytes

        tensors: dict[str, Tensor] = {"prefix_ids": self.prefix_ids}
        if self.attention_mask is not None:
            tensors["attention_mask"] = self.attention_mask
        layers = []
        for index, layer in enumerate(self.cache.layers):
            found, said = _describe(layer)
            tensors |= {f"layers.{index}.{name}": t for name, t in found.items()}
            layers.append(said)
        said = {
            "format": FORMAT,
            "version": linearize.__version__,
            "digest": self.digest,
            "state_version": self.state_version,
            "layers": layers,
        }
        plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        write_atomic(file, to_bytes(plain, {"linearize": json.dumps(said)}))


def prefix(
    model: nn.Module,
    text: str | Sequence[int] | Tensor,
    tokenizer: Any = None,
    file: str | Path | None = None,
    *,
    attention_mask: Tensor | None = None,
) -> Prompt:
    """Run a prompt through a converted model and keep what it remembers; with `file`, also write it there.

    text: words, ids, or ids [B, T] (with `attention_mask` where some are padding). tokenizer: of the words. Raises
    InputError for an empty prompt, a model that is not converted, or words without a tokenizer, StorageError.
    """
    version = state_version(_converted(model))
    device = next(p for p in model.parameters() if p.device.type != "meta").device
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError("prefix: pass the tokenizer of the words")
        ids_BT = tokenizer(text, return_tensors="pt")["input_ids"]
    else:
        ids_BT = torch.as_tensor(text, dtype=torch.long)
        ids_BT = ids_BT[None] if ids_BT.ndim == 1 else ids_BT
    if not ids_BT.numel():
        raise InputError("prefix: the prompt is empty")
    ids_BT = ids_BT.to(device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            masked: dict[str, Tensor] = {}
            if attention_mask is not None:
                masked["attention_mask"] = mask_BT = attention_mask.to(device)
                if "position_ids" in inspect.signature(model.forward).parameters:  # those generate would give
                    masked["position_ids"] = (mask_BT.long().cumsum(1) - 1).masked_fill(mask_BT == 0, 0)
            out = model(input_ids=ids_BT, use_cache=True, **masked)
    finally:
        model.train(training)
    prompt = Prompt(_plain(out.past_key_values), ids_BT, attention_mask, digest(model), version)
    if file is not None:
        prompt.save(file)
    return prompt


def restore(model: nn.Module, state: Prompt | str | Path) -> Any:
    """A new cache of the model's own kind that continues a prompt, for `forward` and `generate`.

    It carries `prefix_ids` [B, T] and `attention_mask`: generate wants them before the new ids (at least one). Raises
    InputError where the state is another model's (by its weights), Unsupported where it is of another layout than this
    linearize reads (Mixer.state_version), StorageError where the file is damaged.
    """
    version, here = state_version(_converted(model)), digest(model)
    if isinstance(state, Prompt):
        _readable(state.state_version, version, "this prompt")
        _same(state.digest, here, "this prompt")
        cache: Any = copy.deepcopy(state.cache)
        cache.prefix_ids, cache.attention_mask = state.prefix_ids.clone(), state.attention_mask
        return cache
    tensors, said = _read(Path(state))
    _readable(said.get("state_version", 1), version, str(state))  # the first layout had no number
    _same(said["digest"], here, str(state))
    config: Any = model.config
    cache = hf.DynamicCache(config=config)
    device = next(p for p in model.parameters() if p.device.type != "meta").device
    mixers = {port.site.layer: mixer for port, mixer in _layers(model)}
    for index, layer in enumerate(said["layers"]):
        prefix_of = f"layers.{index}."
        own = {k.removeprefix(prefix_of): t.to(device) for k, t in tensors.items() if k.startswith(prefix_of)}
        _fill(cache, index, layer, own, mixers.get(index), state)
    mask = tensors.get("attention_mask")
    cache.prefix_ids = tensors["prefix_ids"].to(device)
    cache.attention_mask = None if mask is None else mask.to(device)
    return cache


def snapshot(cache: Any) -> Any:
    """A copy of a cache that shares no memory with it: continue one, keep the other. Any kind of cache."""
    return copy.deepcopy(cache)


def digest(model: nn.Module) -> str:
    """sha256 over names, shapes, dtypes and 64 values of every weight, and the mixers' settings: any training, merging
    or rounding changes it, moving to another device does not."""
    total = hashlib.sha256()
    surgery = Surgery.of(model)
    if surgery is not None:
        total.update(f"{surgery.method} {surgery.config.model_dump_json()} {sorted(surgery.mixers)}".encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        some = flat[:: max(1, -(-len(flat) // 64))].contiguous().cpu()
        total.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------ layers
def _converted(model: nn.Module) -> Surgery:
    surgery = Surgery.of(model)
    if surgery is None:
        raise InputError("this model is not converted: it has no state of constant size (attach a method first)")
    return surgery


def state_version(surgery: Surgery) -> int:
    """Of the layout that the mixers' `state_spec` describes."""
    return next(iter(surgery.mixers.values())).state_version


def _layers(model: nn.Module) -> list[tuple[Any, Any]]:
    surgery = Surgery.of(model)
    assert surgery is not None
    return list(zip(surgery._ports(), surgery.mixers.values(), strict=True))


def _same(stored: str, here: str, what: str) -> None:
    if stored != here:
        raise InputError(
            f"{what} was made by another model (its weights, their dtype or the mixers' settings differ: "
            f"{stored[:12]} there, {here[:12]} here): run linearize.prefix again with this one"
        )


def _readable(stored: int, here: int, what: str) -> None:
    if stored != here:
        remedy = "pip install --upgrade linearize" if stored > here else "run linearize.prefix again"
        raise Unsupported(f"{what} holds a state of layout {stored}, and this linearize reads layout {here}: {remedy}")


def _plain(cache: Any) -> Any:
    return cache.self_attention_cache if isinstance(cache, hf.EncoderDecoderCache) else cache


def _describe(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors of a cache layer by name, what else must be known). Raises Unsupported for a kind that is not known."""
    if isinstance(layer, StateLayer):
        state = layer.slot.state or ()
        return {f"state.{i}": t for i, t in enumerate(state)}, {"kind": "state", "tokens": int(layer.tokens)}
    if type(layer) is hf.DynamicLayer or type(layer) is hf.DynamicSlidingWindowLayer:
        if not layer.is_initialized:
            return {}, {"kind": "empty"}
        assert layer.keys is not None and layer.values is not None
        said = {"kind": "softmax", "tokens": int(layer.get_seq_length())}
        return {"keys": layer.keys, "values": layer.values}, said
    raise Unsupported(f"a {type(layer).__name__} of the cache cannot be written to a file (see linearize.snapshot)")


def _fill(cache: Any, index: int, said: dict[str, Any], own: dict[str, Tensor], mixer: Any, file: Any) -> None:
    """Put one stored layer into a new cache."""
    if said["kind"] == "empty":
        return
    if said["kind"] == "state":
        layer = state_layer(cache, index)
        assert layer is not None
        state = tuple(own[f"state.{i}"] for i in range(len(own)))
        specs = mixer.state_spec() if mixer is not None else None
        if specs is None or len(specs) != len(state) or not all(map(_fits, state, specs)):
            raise StorageError(f"{file}: the state of layer {index} does not fit the model's mixer: write it again")
        layer.slot.state = state
        layer.resume(said["tokens"])
        return
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    layer.lazy_initialization(own["keys"], own["values"])
    layer.keys, layer.values = own["keys"], own["values"]
    if isinstance(layer, hf.DynamicSlidingWindowLayer):
        layer.cumulative_length = said["tokens"]


def _fits(tensor: Tensor, spec: StateSpec) -> bool:
    """Whether a stored tensor is one of this form, for any batch and any number of tokens."""
    return tensor.ndim == len(spec.shape) and all(n in (-1, m) for n, m in zip(spec.shape, tensor.shape, strict=True))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"no state file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get("linearize", "null"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged ({error}): write it again with linearize.prefix") from error
    if said is None:
        raise InputError(f"{path} is no state file of linearize")
    if said["format"] > FORMAT:
        raise Unsupported(f"{path} was written by linearize {said['version']}: pip install --upgrade linearize")
    return tensors, said
