"""The teacher draws its own training data: seeded drawing by drawing, in shards, resumable at any moment.

CLEAR (2412.16112) found 10,000 of the teacher's own images to be better training data than real ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data.latents import Latents
from linearize.data.noise import split
from linearize.data.selfgen import Store, fingerprint
from linearize.progress import bar
from linearize.seams import dit
from linearize.types import InputError, Unsupported

VERSION = 1


def seed_of(seed: int, number: int) -> int:
    """The seed of drawing `number`: neighbouring seeds share none."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")


def noise_of(seeds_B: Tensor, shape: Sequence[int]) -> Tensor:
    """The first noise of each drawing, float32 [B, *shape]: of its seed alone, whatever is drawn beside it."""
    draw = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds_B]
    return torch.stack(draw)


def time_of(model: nn.Module) -> float:
    """What the model's timesteps are multiplied with. Raises Unsupported for a family that nobody described."""
    row = dit.family(model)
    if row is None or row.time is None:
        raise Unsupported(
            f"{type(model).__name__}: how it is told the time is not known here: plug in with linearize.pipelines and "
            "train it in its own pipeline"
        )
    return row.time


@torch.no_grad()
def denoise(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    steps: int,
    *,
    guidance: float = 1.0,
    seen: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """What a model draws from `noise` [B, ...] in so many steps, float32 on the CPU.

    conditions: its other inputs. guidance above 1, of class-conditional models: their class against none
    (2207.12598). seen(timestep, x_t, answer) is called at each step. Deterministic schedulers only.
    """
    place, scale = next(model.parameters()), time_of(model)
    more = {n: t.to(place.device, place.dtype if t.is_floating_point() else None) for n, t in conditions.items()}
    scheduler.set_timesteps(steps)
    x = noise.to(place.device) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        told = (t * scale).to(place.device).expand(len(x))
        out = answer(model, given.to(place.dtype), told, more).float()
        if guidance > 1:
            if "class_labels" not in more:
                raise InputError("guidance needs classes here: models of texts are guided by their own pipeline")
            none = torch.full_like(more["class_labels"], model.config.num_embeds_ada_norm)  # type: ignore[union-attr]
            free = answer(model, given.to(place.dtype), told, {**more, "class_labels": none}).float()
            out = free + guidance * (out - free)
        if seen is not None:
            seen(int(t), x, out)
        x = scheduler.step(out, t, x).prev_sample
    return x.float().cpu()


def answer(model: nn.Module, x: Tensor, told_B: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """One forward, without the variance where it is learned."""
    out = model(hidden_states=x, timestep=told_B, **conditions, return_dict=False)[0]
    return split(out, x.shape[1])[0]


def positions_of(model: Any, shape: Sequence[int]) -> int:
    """Patches of latents of a shape (without the batch): packed ones are patches already."""
    patch = getattr(model.config, "patch_size", 1) or 1
    return shape[0] if len(shape) == 2 else math.prod(n // patch for n in shape[-2:])


def draw_classes(
    model: nn.Module,
    scheduler: Any,
    count: int,
    *,
    classes: Sequence[int] | None = None,
    seed: int = 0,
    steps: int = 20,
    guidance: float = 1.0,
    batch: int = 16,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> Latents:
    """`count` drawings of a class-conditional model (DiT), its classes in turns. classes: None, all of them.

    Drawing n depends on the seed and n alone, so the same call writes the same bytes, and asking for more goes on where
    a smaller call ended. folder: kept there, found again after an interruption. Raises InputError, StorageError.
    """
    config: Any = model.config
    known = getattr(config, "num_embeds_ada_norm", None)
    if not type(model).__name__.startswith("DiT") or known is None:
        raise InputError(f"{type(model).__name__} draws no classes: give prompts (--prompts FILE)")
    chosen = list(range(known)) if classes is None else list(classes)
    if wrong := [c for c in chosen if not 0 <= c < known]:
        raise InputError(f"class {wrong[0]} is none of the model's {known}, 0 to {known - 1}")
    shape = (config.in_channels, config.sample_size, config.sample_size)
    schedule = _schedule(scheduler)
    settings = {"classes": chosen, "seed": seed, "steps": steps, "guidance": guidance, "schedule": schedule}

    def made(numbers: list[int]) -> Latents:
        seeds = torch.tensor([seed_of(seed, n) for n in numbers])
        labels = torch.tensor([chosen[n % len(chosen)] for n in numbers])
        clean = denoise(
            model, scheduler, noise_of(seeds, shape), {"class_labels": labels}, steps, guidance=guidance
        )  # fmt: skip
        return Latents(clean, {"class_labels": labels}, {}, seeds, positions_of(model, shape), {})

    return _sharded(model, made, count, settings, batch, folder, progress)


def draw_prompts(
    pipe: Any,
    prompts: Sequence[str],
    count: int,
    *,
    seed: int = 0,
    steps: int = 20,
    guidance: float | None = None,
    batch: int = 4,
    folder: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Latents:
    """`count` drawings of a pipeline, the prompts in turns, with what its transformer was told beside them.

    options: those of the pipeline (height, width, ...). As `draw_classes`. Raises Unsupported where the transformer is
    told something that is no tensor per drawing.
    """
    if not prompts:
        raise InputError("no prompts: give a file with one on each line")
    model = pipe.transformer
    time_of(model)
    more = {**options, **({} if guidance is None else {"guidance_scale": guidance})}
    words = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    settings = {"prompts": words, "seed": seed, "steps": steps, "options": more, "schedule": _schedule(pipe.scheduler)}

    def made(numbers: list[int]) -> Latents:
        seeds = torch.tensor([seed_of(seed, n) for n in numbers])
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        said = [prompts[n % len(prompts)] for n in numbers]
        told: dict[str, Any] = {}
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: told.update(kwargs) if not told else None, with_kwargs=True
        )
        try:
            clean = pipe(
                prompt=said, num_inference_steps=steps, generator=generators, output_type="latent", **more
            ).images  # fmt: skip
        finally:
            hook.remove()
        each, shared = _told(told, len(numbers))
        clean = clean.float().cpu()
        return Latents(clean, each, shared, seeds, positions_of(model, clean.shape[1:]), {})

    return _sharded(model, made, count, settings, batch, folder, progress)


def _told(told: Mapping[str, Any], count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(inputs of each drawing, inputs that all share) of a transformer's first call; guided pipelines ask for both
    answers in one batch, the unconditional ones first."""
    each, shared = {}, {}
    for name, value in told.items():
        if name in ("hidden_states", "timestep", "return_dict") or value is None or value == {}:
            continue
        if not isinstance(value, Tensor):
            raise Unsupported(f"this pipeline tells its transformer {name} as {type(value).__name__}: not kept yet")
        kept = value.detach().cpu()
        kept = kept.float() if kept.is_floating_point() else kept
        if kept.ndim and kept.shape[0] in (count, 2 * count):
            each[name] = kept[-count:]
        else:
            shared[name] = kept
    return each, shared


def _schedule(scheduler: Any) -> str:
    text = json.dumps({"class": type(scheduler).__name__, **dict(scheduler.config)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sharded(
    model: nn.Module,
    made: Callable[[list[int]], Latents],
    count: int,
    settings: dict[str, Any],
    batch: int,
    folder: str | Path | None,
    progress: bool | None,
) -> Latents:
    if count < 1 or batch < 1:
        raise InputError("drawings need a number and a batch of at least 1")
    settings = {"version": VERSION, "model": fingerprint(model), "batch": batch, **settings}
    store = Store(folder, settings)
    shards: list[Latents] = []
    with bar("the teacher draws its data", count, progress) as advance:
        for number in range(math.ceil(count / batch)):
            kept = store.tensors(number)
            if kept is None:
                start = time.perf_counter()
                shard = made(list(range(number * batch, (number + 1) * batch)))
                packed = {**shard.pack(), "positions": torch.tensor(shard.positions)}
                store.keep(number, packed, time.perf_counter() - start)
            else:
                shard = Latents.unpack(kept, int(kept["positions"]), {})
            shards.append(shard)
            advance(min(batch, count - number * batch))
    taken = Latents.join(shards, settings).take(0, count)
    taken.made = store.made(len(shards), taken.tokens)
    return taken


def read(folder: str | Path) -> Latents:
    """All drawings that a folder of `linearize selfgen` holds. Raises InputError, StorageError."""
    store = Store.found(folder)
    shards = []
    for number in range(len(store.hashes)):
        kept = store.tensors(number)
        if kept is None:
            raise InputError(f"shard {number} of {folder} is missing or damaged: run linearize selfgen again, it mends")
        if "clean" not in kept:
            raise InputError(f"{folder} holds text, no drawings: make some with linearize selfgen")
        shards.append(Latents.unpack(kept, int(kept["positions"]), {}))
    if not shards:
        raise InputError(f"{folder} holds no drawings yet: run linearize selfgen")
    return Latents.join(shards, store.settings)
