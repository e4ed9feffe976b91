"""One small forward after surgery, as the teacher: every port fires once, with the shapes it was planned for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.seams import hooks
from linearize.surgery.port import CHILD, Port
from linearize.types import InputError, Rotary, Unsupported


def small_forward(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    device = hooks.device(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(text, "vocab_size"):
        raise InputError("attach cannot make inputs for this model: pass probe=lambda model: model(...)")
    ids = torch.arange(5, device=device)[None] % text.vocab_size
    return model(input_ids=ids, **({"use_cache": False} if hasattr(text, "use_cache") else {}))


def probe(model: nn.Module, ports: Sequence[Port], run: Callable[[nn.Module], Any]) -> None:
    """Run once as the teacher and check what arrives at each port. Raises Unsupported."""
    training = model.training
    model.eval()
    try:
        for port in ports:
            mixer: Any = model.get_submodule(f"{port.site.name}.{CHILD}")
            port.mode, port.wants_plain, port.fired = "probe", mixer.needs_rotary, 0
        with torch.no_grad():
            run(model)
        if missed := [p for p in ports if p.fired != 1]:
            raise Unsupported(
                f"{missed[0].site.name} was reached {missed[0].fired} times by one forward, not once "
                f"({len(missed)} of {len(ports)} sites); a hook or wrapper is in the way"
            )
        for port in ports:
            _check_shapes(port)
            if port.wants_plain:
                _check_rotary(port)
    finally:
        for port in ports:
            port.mode, port.wants_plain = "student", False
            port.seen.clear()
            port.plain.clear()
        model.train(training)


def _check_shapes(port: Port) -> None:
    q, k, v, _ = port.seen[0]
    s = port.site.shape
    found = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    if found != (s.heads, s.kv_heads, s.key_dim, s.value_dim):
        raise Unsupported(
            f"{port.site.name}: planned for (heads, kv heads, key dim, value dim) = "
            f"{(s.heads, s.kv_heads, s.key_dim, s.value_dim)}, but the model computes {found}"
        )


def _check_rotary(port: Port) -> None:
    """Does undoing the rotation give back what the family had before it? Exact on most; layers without RoPE skip it."""
    q, k, _, rotary = port.seen[0]
    if rotary is None or not port.plain:
        raise Unsupported(f"{port.site.name}: rope: undo has nothing to undo, this family has no rotary embedding")
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


def _undoes(rotary: Rotary, x: Tensor, plain: Tensor) -> bool:
    if rotary.channels > x.shape[-1]:
        return False
    try:
        back = rotary.undo(x)
    except RuntimeError:  # the family's function does not take this many channels
        return False
    return bool((back - plain).abs().max() <= 1e-3 * plain.abs().max().clamp(min=1e-6))
