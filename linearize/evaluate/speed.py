"""Time and bytes of teacher and student, in turns in one process: medians of repeats, and the ratio pair by pair.

Of models (`speed`: texts by tokens, images by pixels), and of one attention layer without its projections (`layer`).
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.mixers import base as mixers
from linearize.plan import TransferPlan
from linearize.stages.transfer import Transfer
from linearize.surgery.attach import Surgery
from linearize.types import Context, InputError, SiteShape

_RATIOS = {
    "ratio": "student over teacher, median of pairs",
    "ratio_low": "lowest pair",
    "ratio_high": "highest pair",
}
#: what the numbers of a row are in, of texts
UNITS = {
    "teacher_tokens_per_second": "tokens/s",
    "student_tokens_per_second": "tokens/s",
    **_RATIOS,
    "teacher_bytes": "bytes per sequence",
    "student_bytes": "bytes per sequence",
}
#: of images
IMAGE_UNITS = {
    "tokens": "per image",
    "teacher_images_per_second": "images/s",
    "student_images_per_second": "images/s",
    **_RATIOS,
    "teacher_peak_bytes": "bytes at once in one forward",
    "student_peak_bytes": "bytes at once in one forward",
}
#: of one attention layer
LAYER_UNITS = {
    "softmax_seconds": "s",
    "mixer_seconds": "s",
    "ratio": "SDPA over mixer, median of pairs",
    **{name: _RATIOS[name] for name in ("ratio_low", "ratio_high")},
    "softmax_peak_bytes": "bytes at once",
    "mixer_peak_bytes": "bytes at once",
}


Run = Callable[[], Any]


def _seconds(run: Run, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def pairs(
    first: Callable[[], Run],
    second: Callable[[], Run],
    device: torch.device,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Seconds of (first, second), in turns, after one warm-up of each. Both are called to prepare a run, untimed."""
    first()()
    second()()
    return [(_seconds(first(), device, clock), _seconds(second(), device, clock)) for _ in range(repeats)]


def peak_bytes(run: Run, device: torch.device) -> int:
    """The most bytes of tensors that `run` has allocated at once, what was there before not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    kineto: Any = profiled.profiler and profiled.profiler.kineto_results
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def _ratios(timed: Sequence[tuple[float, float]]) -> dict[str, float]:
    ratios = [teacher / student for teacher, student in timed]
    return {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


def _row(amount: int, what: str, timed: Sequence[tuple[float, float]], **more: float) -> dict[str, float]:
    return {
        f"teacher_{what}_per_second": amount / statistics.median(t for t, _ in timed),
        f"student_{what}_per_second": amount / statistics.median(s for _, s in timed),
        **_ratios(timed),
        **more,
    }


def speed(
    surgery: Surgery,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    repeats: int = 5,
    new_tokens: int = 16,
    stage: TransferPlan | None = None,
) -> dict[str, dict[str, float]]:
    """Rows by name, metrics as in UNITS; of models of images see `image_speed`, whose `lengths` are pixels.

    "prefill T": one forward of `batch` random sequences of T tokens, last logits only. "decode at T": `new_tokens`
    single-token steps behind a context of T (causal models alone). "transfer T": one forward and backward of attention
    transfer, by the losses of `stage` (None: the output alone), against the teacher's own no-grad forward with all
    logits, same batch and length. Raises InputError.
    """
    model: Any = surgery.model
    if model.main_input_name == "pixel_values":
        return image_speed(surgery, lengths, batch=batch, repeats=repeats)
    device = next(model.parameters()).device
    causal = all(site.shape.causal for site in surgery.sites)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not causal and most is not None and max(lengths) > most:  # tables of positions, not rotations
        raise InputError(f"this {model.config.model_type} has {most} positions: ask for --lengths up to that")
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    for length in lengths:
        ids = torch.randint(vocabulary, (batch, length), generator=generator).to(device)
        mixer = sum(m.state_bytes(length) for m in surgery.mixers.values())
        cache = sum(s.kv_bytes(length) for s in surgery.sites)
        kept = {"teacher_bytes": float(cache), "student_bytes": float(mixer)}
        prefill = pairs(_prefill(model, ids, surgery.teacher), _prefill(model, ids, nullcontext), device, repeats)
        rows[f"prefill {length}"] = _row(batch * length, "tokens", prefill, **(kept if causal else {}))
        if causal:
            student, teacher = (_decoder(model, ids, new_tokens, mode) for mode in (nullcontext, surgery.teacher))
            decode = pairs(teacher, student, device, repeats)
            rows[f"decode at {length}"] = _row(batch * new_tokens, "tokens", decode, **kept)
        if surgery.parameters():
            rows[f"transfer {length}"] = _row(batch * length, "tokens", _transfer(surgery, ids, repeats, stage))
    return rows


def image_speed(
    surgery: Surgery, sizes: Sequence[int], *, batch: int = 1, repeats: int = 5
) -> dict[str, dict[str, float]]:
    """Rows "S px" for one forward of `batch` random images of S x S pixels, metrics as in IMAGE_UNITS.

    Positions are interpolated as the model itself does. Raises InputError where it does not, or where S is no multiple
    of its patch.
    """
    model: Any = surgery.model
    config, weight = model.config, next(model.parameters())
    patch, kind = getattr(config, "patch_size", 1), config.model_type
    patch = patch if isinstance(patch, int) else math.lcm(*patch)
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    more = {"interpolate_pos_encoding": True} if takes else {}
    rows: dict[str, dict[str, float]] = {}
    for size in sizes:
        if size < patch or size % patch:
            raise InputError(f"--lengths {size}: this {kind} cuts images in patches of {patch} pixels, take a multiple")
        images = torch.randn(batch, config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
        images = images.to(weight.device, weight.dtype)

        @torch.no_grad()
        def run(mode: Callable[[], Any], images: Tensor = images) -> Any:
            with mode():
                return model(pixel_values=images, **more)

        teacher, student = (lambda mode=mode: run(mode) for mode in (surgery.teacher, nullcontext))
        try:
            memory = {name: peak_bytes(r, images.device) for name, r in (("teacher", teacher), ("student", student))}
        except ValueError as error:
            raise InputError(f"this {kind} takes no images of {size} pixels: {str(error).splitlines()[0]}") from error
        timed = pairs(lambda r=teacher: r, lambda r=student: r, images.device, repeats)
        kept = {f"{name}_peak_bytes": float(n) for name, n in memory.items()}
        rows[f"{size} px"] = _row(batch, "images", timed, tokens=float((size // patch) ** 2), **kept)
    return rows


def layer(
    shape: SiteShape,
    methods: Mapping[str, dict[str, Any]],
    grids: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    repeats: int = 5,
    device: str = "cpu",
    beside: Callable[[int], dict[str, Any]] = lambda tokens: {},
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Rows "METHOD T" for one attention layer between its projections, untrained mixers against SDPA, metrics as in
    LAYER_UNITS: q, k and v to the output, over the T patches of each grid (causal: over its T tokens in a row).
    methods: name -> the mixer's settings. beside: what else the context of so many tokens holds. Runs of milliseconds
    are repeated up to 21 times. clock: time.process_time for a machine that others use as well."""
    rows: dict[str, dict[str, float]] = {}
    generator, where = torch.Generator().manual_seed(0), torch.device(device)
    for name, settings in methods.items():
        mixer = mixers.build(name, shape, settings).to(where).eval()
        for grid in grids:
            tokens = math.prod(grid)
            q_BHTK, k_BGTK = (
                torch.randn(batch, heads, tokens, shape.key_dim, generator=generator).to(where)
                for heads in (shape.heads, shape.kv_heads)
            )
            v_BGTV = torch.randn(batch, shape.kv_heads, tokens, shape.value_dim, generator=generator).to(where)
            ctx = Context(shape.causal, shape.scale, grid=None if shape.causal else grid, **beside(tokens))

            @torch.no_grad()
            def softmax(q=q_BHTK, k=k_BGTK, v=v_BGTV) -> Tensor:
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=shape.causal, scale=shape.scale, enable_gqa=shape.group > 1
                )

            @torch.no_grad()
            def mixed(mixer=mixer, q=q_BHTK, k=k_BGTK, v=v_BGTV, ctx=ctx) -> Tensor:
                return mixer(q, k, v, ctx)

            timed = pairs(lambda r=softmax: r, lambda r=mixed: r, where, repeats, clock)
            more = min(21, int(1 / sum(timed[0]))) - len(timed)  # short runs are disturbed more easily
            timed += pairs(lambda r=softmax: r, lambda r=mixed: r, where, more, clock) if more > 0 else []
            rows[f"{name} {tokens}"] = {
                "softmax_seconds": statistics.median(t for t, _ in timed),
                "mixer_seconds": statistics.median(s for _, s in timed),
                **_ratios(timed),
                "softmax_peak_bytes": float(peak_bytes(softmax, where)),
                "mixer_peak_bytes": float(peak_bytes(mixed, where)),
            }
    return rows


def _prefill(model: Any, ids: Tensor, mode: Callable[[], Any]) -> Callable[[], Run]:
    cached = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}

    @torch.no_grad()
    def run() -> None:
        with mode():
            model(input_ids=ids, **cached)

    return lambda: run


def _decoder(model: Any, ids: Tensor, steps: int, mode: Callable[[], Any]) -> Callable[[], Run]:
    """Decodes `steps` tokens behind `ids`: the context is read once, every run starts from a copy of its cache."""
    with torch.no_grad(), mode():
        read = model(input_ids=ids, use_cache=True).past_key_values

    def prepare() -> Run:
        cache = copy.deepcopy(read)

        @torch.no_grad()
        def run() -> None:
            with mode():
                for _ in range(steps):
                    model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

        return run

    return prepare


def _transfer(surgery: Surgery, ids: Tensor, repeats: int, stage: TransferPlan | None) -> list[tuple[float, float]]:
    trained = {name: p.requires_grad for name, p in surgery.model.named_parameters()}
    stage = stage or TransferPlan(kind="transfer", tokens=ids.numel(), batch=ids.shape[0], lr=1e-3)
    objective = Transfer(surgery, stage)

    def step() -> None:
        objective.loss({"input_ids": ids}, 0)["loss"].backward()
        for parameter in surgery.parameters():
            parameter.grad = None

    timed = pairs(_prefill(surgery.model, ids, surgery.teacher), lambda: step, ids.device, repeats)
    for name, parameter in surgery.model.named_parameters():
        parameter.requires_grad_(trained[name])
    return timed
