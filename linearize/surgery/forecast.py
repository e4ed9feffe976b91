"""What a conversion will come to, from shapes alone: no weights, no forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from linearize.mixers import base as mixers
from linearize.mixers.base import Mixer
from linearize.surgery.select import break_even
from linearize.types import Site, SiteShape

_LONGEST = 1 << 26  # tokens; a break-even beyond this is called never


@dataclass(frozen=True)
class Group:
    """Converted layers of one shape. parameters: new ones, in all of them. state_bytes: of one layer and sequence, at
    the target length. break_even_*: tokens from which one such layer's state is no larger than its cache, and its
    FLOPs are fewer than softmax's (None: never)."""

    sites: tuple[str, ...]
    layers: tuple[int | None, ...]
    shape: dict[str, Any]
    drops: tuple[str, ...]
    parameters: int
    state_bytes: int
    break_even_memory: int | None
    break_even_flops: int | None


@dataclass(frozen=True)
class Length:
    """One sequence of `tokens`: cache and attention FLOPs of the whole model, before and after."""

    tokens: int
    kv_bytes: int
    state_bytes: int
    teacher_flops: float
    student_flops: float


@dataclass(frozen=True)
class Forecast:
    """The whole model. break_even_*: lengths from which the converted model holds less, and computes less, in its
    attention than the teacher (None: never)."""

    method: str
    model_type: str
    base_parameters: int
    new_parameters: int
    groups: list[Group]
    left: dict[str, str]
    kept: list[str]
    lengths: list[Length]
    break_even_memory: int | None
    break_even_flops: int | None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast(
    model: nn.Module,
    sites: Sequence[Site],
    chosen: Sequence[Site],
    left: Mapping[str, str],
    method: str,
    settings: Any,
    lengths: Sequence[int],
    target_length: int,
) -> Forecast:
    """`sites` are all of the model's, `chosen` those to convert, `left` the reasons for some that are not."""
    built: dict[SiteShape, mixers.Mixer] = {}
    with torch.device("meta"):
        for site in chosen:
            if site.shape not in built:
                built[site.shape] = mixers.build(method, site.shape, settings)
    kinds: dict[Any, list[Site]] = {}
    for site in chosen:
        kinds.setdefault((site.shape, site.cache_dims, site.drops), []).append(site)
    groups = []
    for (shape, _, drops), members in kinds.items():
        mixer = built[shape]
        groups.append(
            Group(
                sites=tuple(site.name for site in members),
                layers=tuple(site.layer for site in members),
                shape=asdict(shape),
                drops=drops,
                parameters=len(members) * sum(p.numel() for p in mixer.parameters()),
                state_bytes=mixer.state_bytes(target_length),
                break_even_memory=break_even(members[0], method, settings),
                break_even_flops=break_even_tokens(mixer, shape),
            )
        )

    names = {site.name for site in chosen}
    others = [site for site in sites if site.name not in names]

    def student_bytes(T: int) -> int:
        return sum(built[s.shape].state_bytes(T) for s in chosen) + sum(s.kv_bytes(T) for s in others)

    def student_flops(T: int) -> float:
        return sum(built[s.shape].cost(T).flops for s in chosen) + sum(softmax_flops(s.shape, T) for s in others)

    def teacher_bytes(T: int) -> int:
        return sum(site.kv_bytes(T) for site in sites)

    def teacher_flops(T: int) -> float:
        return sum(softmax_flops(site.shape, T) for site in sites)

    return Forecast(
        method=method,
        model_type=getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        base_parameters=sum(p.numel() for p in model.parameters()),
        new_parameters=sum(group.parameters for group in groups),
        groups=groups,
        left=dict(left),
        kept=[site.name for site in others if site.name not in left],
        lengths=[Length(T, teacher_bytes(T), student_bytes(T), teacher_flops(T), student_flops(T)) for T in lengths],
        break_even_memory=_first_below(student_bytes, teacher_bytes) if chosen else None,
        break_even_flops=_first_below(student_flops, teacher_flops) if chosen else None,
    )


def break_even_tokens(mixer: Mixer, shape: SiteShape) -> int | None:
    """Tokens from which the mixer takes no more operations than the teacher's attention (None: never)."""
    return _first_below(lambda T: mixer.cost(T).flops, lambda T: softmax_flops(shape, T))


def softmax_flops(shape: SiteShape, tokens: int) -> float:
    """Forward FLOPs of the teacher's attention over one sequence: scores and weighted sum, seen pairs only."""
    if not shape.causal:
        pairs = tokens * tokens
    else:
        window = tokens if shape.window is None else min(shape.window, tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window
    return 2.0 * pairs * shape.heads * (shape.key_dim + shape.value_dim)


def _first_below(ours: Callable[[int], float], theirs: Callable[[int], float]) -> int | None:
    """The smallest length where `ours` <= `theirs`, for curves that cross at most once; None if that is never."""
    high = 1
    while ours(high) > theirs(high):
        high *= 2
        if high > _LONGEST:
            return None
    low = high // 2  # ours is above here
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ours(middle) <= theirs(middle) else (middle, high)
    return high
