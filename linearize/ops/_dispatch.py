"""Choosing an implementation: by the tensors' device, never by what happens to import.

A named implementation never falls back. "auto" takes the first one that does not refuse, and says once which and why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from linearize.types import InputError, nearest

log = logging.getLogger("linearize.ops")
_said: set[tuple[str, ...]] = set()
#: calls by (op, implementation), of this process
calls: Counter[tuple[str, str]] = Counter()


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. refuses(*args, **kwargs) returns the reason it cannot take a call, or None. device: the
    type of device that "auto" takes it for (None: any)."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = lambda *args, **kwargs: None
    device: str | None = None


def choose(op: str, implementations: Sequence[Implementation], impl: str, *args: Any, **kwargs: Any) -> Implementation:
    """The implementation for this call. Raises InputError if a named one is unknown or refuses."""
    if impl != "auto":
        for candidate in implementations:
            if candidate.name == impl:
                if reason := candidate.refuses(*args, **kwargs):
                    raise InputError(f"{op}: impl={impl!r} refuses this call: {reason}")
                return _counted(op, candidate)
        raise InputError(f"{op}: unknown impl {impl!r}; {nearest(impl, [i.name for i in implementations])}")
    here = next((a.device.type for a in args if isinstance(a, torch.Tensor)), None)
    for candidate in implementations:
        if candidate.device not in (None, here):
            reason = f"it is for {candidate.device}, the tensors are on {here}"
        else:
            reason = candidate.refuses(*args, **kwargs)
        _say(op, candidate.name, reason)
        if reason is None:
            return _counted(op, candidate)
    raise InputError(f"{op}: no implementation takes this call")


def used(before: Counter[tuple[str, str]]) -> dict[str, list[str]]:
    """By op, the implementations called since `before`, a copy of `calls`."""
    found: dict[str, list[str]] = {}
    for op, name in sorted(calls - before):
        found.setdefault(op, []).append(name)
    return found


def _counted(op: str, chosen: Implementation) -> Implementation:
    if not torch.compiler.is_compiling():
        calls[op, chosen.name] += 1
    return chosen


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if an input is, else float32: what states, sums and normalisers are computed in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v in the type of the computation, a head of keys and values for each of queries."""
    dtype, group = compute_dtype(q, k, v), q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return (q, k, v) if group == 1 else (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _say(op: str, name: str, reason: str | None) -> None:
    key = (op, name, reason or "")
    if key not in _said and not torch.compiler.is_compiling():  # a graph holds no logging
        _said.add(key)
        log.info("%s: %s", op, f"{name} refused: {reason}" if reason else f"using {name}")


def kernels_refuse(q: torch.Tensor, *sizes: int, largest: int = 128) -> str | None:
    """Why Triton kernels cannot take tensors like q whose heads have these sizes, or None."""
    import importlib.util
    import os

    if torch.compiler.is_exporting():
        return "kernels are not exported"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"kernels take 16 and 32-bit floats, not {str(q.dtype).removeprefix('torch.')}"
    if max(sizes) > largest:
        return f"kernels take head sizes up to {largest}, not {max(sizes)}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not q.is_cuda and not interpreted:
        return f"kernels run on GPUs, and the tensors are on {q.device.type} (for tests: TRITON_INTERPRET=1)"
    if interpreted and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly: take float16 or float32"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    return None


def softmax_kernels_refuse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, largest: int = 128
) -> str | None:
    """The same of kernels that hold whole rows of q, k and v."""
    reasons = (kernels_refuse(x, x.shape[-1], largest=largest) for x in (q, k, v))
    return next((reason for reason in reasons if reason), None)
