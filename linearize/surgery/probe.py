"""One small forward after surgery, as the teacher: every call of a converted module reaches its port, with what it was
planned for."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.seams import dit_inputs, hooks
from linearize.surgery.port import CHILD, Port
from linearize.surgery.select import BIAS
from linearize.types import InputError, Rotary, Unsupported


def small_forward(model: nn.Module) -> Any:
    """One image (two, where a forward takes many), or five tokens (for both sides of an encoder-decoder). The image is
    a ramp: of a blank one q and k may be zeros, which no rotation changes.

    Raises InputError for models that take other inputs."""
    config: Any = getattr(model, "config", None)
    device = hooks.device(model)
    if (inputs := dit_inputs.small_inputs(model, dtype=hooks.dtype(model), device=device)) is not None:
        return model(**inputs, return_dict=False)
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        image = _ramp(1, config.num_channels, rows, columns, dtype=dtype, device=device)
        if "noise" not in inspect.signature(model.forward).parameters:
            return model(pixel_values=image)
        patches = (rows // config.patch_size) * (columns // config.patch_size)
        return model(pixel_values=image, noise=torch.arange(patches, device=device)[None])  # the patches in order
    if "grid_thw" in inspect.signature(model.forward).parameters:  # patches of images of any size, end to end
        side = 2 * config.spatial_merge_size
        weights = next(m.weight for m in model.modules() if isinstance(m, nn.Conv3d))
        patches = _ramp(2 * side**2, weights[0].numel(), dtype=weights.dtype, device=weights.device)
        return model(patches, grid_thw=torch.tensor([[1, side, side]] * 2, device=device))
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "vocab_size"):
        raise InputError("attach cannot make inputs for this model: pass probe=lambda model: model(...)")
    ids = torch.arange(5, device=device)[None] % text.vocab_size
    more: dict[str, Any] = {"use_cache": False} if hasattr(text, "use_cache") else {}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        more["decoder_input_ids"] = ids
    return model(input_ids=ids, **more)


def _ramp(*sizes: int, **kind: Any) -> Tensor:
    return torch.linspace(-1, 1, math.prod(sizes), **kind).view(sizes)


def probe(model: nn.Module, ports: Sequence[Port], run: Callable[[nn.Module], Any]) -> None:
    """Run once as the teacher and check what arrives at each port. Raises Unsupported."""
    with _arrived(model, ports, run, plain=True):
        if shared := [p for p in ports if p.fired > 1 and p.site.layer is not None]:
            raise Unsupported(
                f"{shared[0].site.name} was reached {shared[0].fired} times by one forward: layers that share one "
                "module would share one place in the cache"
            )
        for port in ports:
            _check_shapes(port)
            _check_scores(port)
            _check_grid(port, model.get_submodule(f"{port.site.name}.{CHILD}"))
            if port.wants_plain:
                _check_rotary(port, model.get_submodule(f"{port.site.name}.{CHILD}"))


def reach(model: nn.Module, ports: Sequence[Port], run: Callable[[nn.Module], Any]) -> None:
    """The first half of `probe`: every call of a converted module comes by its port. Raises Unsupported."""
    with _arrived(model, ports, run, plain=False):
        pass


@contextlib.contextmanager
def _arrived(model: nn.Module, ports: Sequence[Port], run: Callable[[nn.Module], Any], plain: bool) -> Iterator[None]:
    """While it lasts, ports hold what one forward as the teacher brought them (plain: without rotation too, where a
    mixer wants that). Raises Unsupported where a call of a module went past its port."""
    training, modes = model.training, [port.mode for port in ports]
    model.eval()
    try:
        for port in ports:
            mixer: Any = model.get_submodule(f"{port.site.name}.{CHILD}")
            port.mode, port.wants_plain, port.entered, port.fired = "probe", plain and mixer.needs_rotary, 0, 0
        with torch.no_grad():
            run(model)
        if missed := [p for p in ports if not p.fired or not p.entered or p.fired % p.entered]:
            raise Unsupported(
                f"{missed[0].site.name} was reached {missed[0].fired} times by one forward of the model, which called "
                f"it {missed[0].entered} times ({len(missed)} of {len(ports)} sites); a hook or wrapper is in the way"
            )
        for port in ports:
            port.calls = port.fired if port.fired == port.entered else None  # image by image: as many as there are
        yield
    finally:
        for port, mode in zip(ports, modes, strict=True):
            port.mode, port.wants_plain = mode, False
            port.seen.clear()
            port.plain.clear()
        model.train(training)


def _check_shapes(port: Port) -> None:
    q, k, v = port.seen[0][:3]
    s = port.site.shape
    found = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if found != (s.heads, s.kv_heads, s.key_dim, s.value_dim):
        raise Unsupported(
            f"{port.site.name}: planned for (heads, kv heads, key dim, value dim) = "
            f"{(s.heads, s.kv_heads, s.key_dim, s.value_dim)}, but the model computes {found}"
        )


def _check_scores(port: Port) -> None:
    """Is there more to the teacher's scores than the site says: another direction, or a bias?"""
    mask, options = port.seen[0].mask, port.seen[0].options
    if options.get("is_causal") and not port.site.shape.causal:
        raise Unsupported(f"{port.site.name} was planned as bidirectional, but the model calls it with is_causal=True")
    if BIAS in port.site.drops:
        return
    biases = [x for x in (mask, options.get("position_bias")) if isinstance(x, Tensor) and x.is_floating_point()]
    if any(bool(((x != 0) & (x > torch.finfo(x.dtype).min / 2)).any()) for x in biases):
        raise Unsupported(
            f"{port.site.name}: the model adds a bias of its own to the attention scores, which no mixer keeps and "
            "linearize does not know"
        )


def _check_grid(port: Port, mixer: Any) -> None:
    """Are the tokens the patches of the image, in order? From here on, as many others must come before them."""
    try:
        layout = port.layout(port.seen[0].q.shape[2], mixer)
    except InputError as error:
        raise Unsupported(str(error)) from None
    port.prefix = layout.prefix if layout else None


def _check_rotary(port: Port, mixer: Any) -> None:
    """Does undoing the rotation give back what the family had before it? Exact on most; layers without RoPE skip it."""
    q, k, _, rotary = port.seen[0][:4]
    if rotary is None or not port.plain:
        rope = getattr(mixer.config, "rope", "undo")
        if rope == "auto" and _speaks_of_no_rotation(port.cls):
            port.rotates = False
            return
        raise Unsupported(
            f"{port.site.name}: rope: {rope} has nothing to undo, no rotary embedding of this family is known; "
            "use rope: keep"
        )
    q_plain, k_plain = port.plain
    if torch.equal(q, q_plain) and torch.equal(k, k_plain):
        port.rotates = False  # a NoPE layer: there is nothing to undo, and q, k are already plain
        return
    for channels in (rotary.channels, 2 * rotary.channels):
        if all(_undoes(replace(rotary, channels=channels), *pair) for pair in ((q, q_plain), (k, k_plain))):
            port.rotary_channels = channels
            return
    raise Unsupported(
        f"{port.site.name}: this family's rotary embedding cannot be undone (it permutes channels or rotates a part of "
        "its own); use rope: keep"
    )


def _speaks_of_no_rotation(cls: type[nn.Module]) -> bool:
    """Whether the family's own file has no word of rotary embeddings."""
    try:
        text = inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError):
        return False
    return re.search(r"rotary|\brope\b|rope_|_rope", text, re.IGNORECASE) is None


def _undoes(rotary: Rotary, x: Tensor, plain: Tensor) -> bool:
    if rotary.channels > x.shape[-1]:
        return False
    try:
        back = rotary.undo(x)
    except RuntimeError:  # the family's function does not take this many channels
        return False
    return bool((back - plain).abs().max() <= 1e-3 * plain.abs().max().clamp(min=1e-6))
