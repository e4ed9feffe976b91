"""Time and bytes of teacher and student, in turns in one process: medians of repeats, and the ratio pair by pair."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from linearize.plan import TransferPlan
from linearize.stages.transfer import Transfer
from linearize.surgery.attach import Surgery

#: what the numbers of a row are in
UNITS = {
    "teacher_tokens_per_second": "tokens/s",
    "student_tokens_per_second": "tokens/s",
    "ratio": "student over teacher, median of pairs",
    "ratio_low": "lowest pair",
    "ratio_high": "highest pair",
    "teacher_bytes": "bytes per sequence",
    "student_bytes": "bytes per sequence",
}


Run = Callable[[], Any]


def _seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pairs(
    first: Callable[[], Run], second: Callable[[], Run], device: torch.device, repeats: int
) -> list[tuple[float, float]]:
    """Seconds of (first, second), in turns, after one warm-up of each. Both are called to prepare a run, untimed."""
    first()()
    second()()
    return [(_seconds(first(), device), _seconds(second(), device)) for _ in range(repeats)]


def _row(tokens: int, timed: Sequence[tuple[float, float]], **more: float) -> dict[str, float]:
    ratios = [teacher / student for teacher, student in timed]
    return {
        "teacher_tokens_per_second": tokens / statistics.median(t for t, _ in timed),
        "student_tokens_per_second": tokens / statistics.median(s for _, s in timed),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        **more,
    }


def speed(
    surgery: Surgery, lengths: Sequence[int], *, batch: int = 1, repeats: int = 5, new_tokens: int = 16
) -> dict[str, dict[str, float]]:
    """Rows "prefill T", "decode at T" and "transfer T" by name, metrics as in UNITS.

    prefill: one forward of `batch` random sequences of T tokens, last logits only. decode: `new_tokens` single-token
    steps behind a context of T. transfer: one forward and backward of attention transfer against the teacher's own
    no-grad forward with all logits, same batch and length.
    """
    model: Any = surgery.model
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    for length in lengths:
        ids = torch.randint(vocabulary, (batch, length), generator=generator).to(device)
        mixer = sum(m.state_bytes(length) for m in surgery.mixers.values())
        cache = sum(s.kv_bytes(length) for s in surgery.sites)
        kept = {"teacher_bytes": float(cache), "student_bytes": float(mixer)}
        prefill = pairs(_prefill(model, ids, surgery.teacher), _prefill(model, ids, nullcontext), device, repeats)
        rows[f"prefill {length}"] = _row(batch * length, prefill, **kept)
        student, teacher = (_decoder(model, ids, new_tokens, mode) for mode in (nullcontext, surgery.teacher))
        decode = pairs(teacher, student, device, repeats)
        rows[f"decode at {length}"] = _row(batch * new_tokens, decode, **kept)
        if surgery.parameters():
            rows[f"transfer {length}"] = _row(batch * length, _transfer(surgery, ids, repeats))
    return rows


def _prefill(model: Any, ids: Tensor, mode: Callable[[], Any]) -> Callable[[], Run]:
    @torch.no_grad()
    def run() -> None:
        with mode():
            model(input_ids=ids, use_cache=False)

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


def _transfer(surgery: Surgery, ids: Tensor, repeats: int) -> list[tuple[float, float]]:
    trained = {name: p.requires_grad for name, p in surgery.model.named_parameters()}
    objective = Transfer(surgery, TransferPlan(kind="transfer", tokens=ids.numel(), batch=ids.shape[0], lr=1e-3))

    def step() -> None:
        objective.loss({"input_ids": ids}, 0)["loss"].backward()
        for parameter in surgery.parameters():
            parameter.grad = None

    timed = pairs(_prefill(surgery.model, ids, surgery.teacher), lambda: step, ids.device, repeats)
    for name, parameter in surgery.model.named_parameters():
        parameter.requires_grad_(trained[name])
    return timed
