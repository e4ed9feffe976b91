"""How good a converted diffusion model is: it draws from the same noise as its teacher, under the same conditions.

Figures of pairs come from one number per drawing, so that intervals resample drawings (evaluate/encoders.py); those of
sets have none. Everything stands beside the floor: the teacher's own drawings from other noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data.drawing import answer, denoise, noise_of, seed_of, time_of
from linearize.data.latents import Latents
from linearize.evaluate import judges, mosaics
from linearize.evaluate.encoders import Sample
from linearize.evaluate.encoders import Score as Samples
from linearize.evaluate.quality import STUDENT, TEACHER, Variant, chosen, evaluating
from linearize.progress import bar
from linearize.types import GateError

FLOOR = "teacher, other seeds"
FOLLOWED = 32  # drawings along whose way, as the teacher goes it, answers are compared
PART = 50  # pictures compared at a time, in double precision
TIMED = (4, 50)  # steps of the drawings that are timed
Teacher = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Score:
    """One variant: drawn [N, ...] from the same noise; error_MS: of its answers on the teacher's own way, relative, by
    drawing and step (None: the teacher's, and its floor). seconds: by number of steps, of one drawing and of the
    teacher's in turns with it (of the student alone)."""

    name: str
    drawn: Tensor
    error_MS: Tensor | None = None
    seconds: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass
class Way:
    """Where the teacher's first drawings came by: x_t and its answers at each timestep."""

    times: list[int] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)


class Studio:
    """Draws the examples of `data` with any variant; the teacher goes first, once."""

    def __init__(
        self, data: Latents, scheduler: Any, steps: int, batch: int, finish: Callable[[Tensor], Any] | None = None
    ) -> None:
        """finish: what makes a picture of a drawing, where it is none (timed along)."""
        self.finish = finish
        self.data, self.scheduler, self.steps, self.batch = data, scheduler, steps, batch
        self.seeds = data.seeds[data.order]
        self.way: Way | None = None
        self.known: dict[str, Score] = {}

    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, progress: bool | None = None
    ) -> list[Score]:
        """Scores of the teacher, its floor, and each variant. Raises GateError where a drawing is not finite."""
        with evaluating(model), bar("drawing", len(self.data) * (len(variants) + 2), progress) as advance:
            with teacher() as other:
                subject = chosen(model, other)
                if TEACHER not in self.known:
                    drawn = self._draw(subject, self.seeds, advance)
                    self.known[TEACHER] = Score(TEACHER, drawn)
                if FLOOR not in self.known:
                    others = torch.tensor([seed_of(int(seed), 1) for seed in self.seeds])
                    self.known[FLOOR] = Score(FLOOR, self._draw(subject, others, advance))
                if self.way is None:
                    self.way = self._walk(subject)
            for name, enter in variants:
                with enter() as other:
                    subject = chosen(model, other)
                    drawn = self._draw(subject, self.seeds, advance)
                    self.known[name] = Score(name, drawn, self._error(subject))
                if not drawn.isfinite().all():
                    raise GateError(f"row {name!r}: drawings are not finite; look for NaN or inf in the weights")
            if STUDENT in self.known and not self.known[STUDENT].seconds:
                enter = dict(variants).get(STUDENT)
                if enter is not None:
                    seconds = self._timed(model, enter, teacher)
                    self.known[STUDENT] = replace(self.known[STUDENT], seconds=seconds)
        return [self.known[name] for name in (TEACHER, FLOOR, *(name for name, _ in variants))]

    def _conditions(self, rows: slice) -> dict[str, Tensor]:
        each = {name: values[rows] for name, values in self.data.conditions().items()}
        return {**each, **self.data.shared}

    def _draw(self, model: nn.Module, seeds_N: Tensor, advance: Callable[[int], None]) -> Tensor:
        shape, found = self.data.clean.shape[1:], []
        for start in range(0, len(seeds_N), self.batch):
            rows = slice(start, start + self.batch)
            noise = noise_of(seeds_N[rows], shape)
            found.append(denoise(model, self.scheduler, noise, self._conditions(rows), self.steps))
            advance(len(noise))
        return torch.cat(found)

    def _walk(self, model: nn.Module) -> Way:
        way, some = Way(), slice(0, min(FOLLOWED, len(self.data)))

        def seen(t: int, x: Tensor, out: Tensor) -> None:
            way.times.append(t)
            way.x.append(x.clone())
            way.answers.append(out)

        noise = noise_of(self.seeds[some], self.data.clean.shape[1:])
        denoise(model, self.scheduler, noise, self._conditions(some), self.steps, seen=seen)
        return way

    @torch.no_grad()
    def _error(self, model: nn.Module) -> Tensor:
        """Squared error of the answers over the squares of the teacher's, [M, S]."""
        assert self.way is not None
        place, scale = next(model.parameters()), time_of(model)
        more = self._conditions(slice(0, len(self.way.x[0])))
        more = {n: t.to(place.device, place.dtype if t.is_floating_point() else None) for n, t in more.items()}
        found = []
        for t, x, known in zip(self.way.times, self.way.x, self.way.answers):
            told = torch.full((len(x),), t * scale, device=place.device)
            own = answer(model, x.to(place.dtype), told, more).float()
            found.append((own - known).square().flatten(1).sum(1) / known.square().flatten(1).sum(1))
        return torch.stack(found, 1).double().cpu()

    def _timed(self, model: nn.Module, student: Teacher, teacher: Teacher) -> dict[int, tuple[float, float]]:
        """Seconds of one drawing, end to end, of both in turns, after one step each to warm up."""
        some = slice(0, 1)
        noise, found = noise_of(self.seeds[some], self.data.clean.shape[1:]), {}
        for steps in (1, *TIMED):
            pair = []
            for enter in (student, teacher):
                with enter() as other:
                    start = time.perf_counter()
                    drawn = denoise(chosen(model, other), self.scheduler, noise, self._conditions(some), steps)
                    if self.finish is not None:
                        self.finish(drawn)
                    pair.append(time.perf_counter() - start)
            found[steps] = (pair[0], pair[1])
        return {steps: found[steps] for steps in TIMED}


# ---------------------------------------------------------------------------------------------------------- the figures
def samples(
    score: Score,
    teacher: Score,
    labels_N: Tensor | None,
    judge: Any,
    layout: mosaics.Layout | None = None,
    shown: tuple[Tensor, Tensor] | None = None,
) -> Samples:
    """One number per drawing: distance (root mean square), trajectory, and of pictures psnr, ssim, what a judge sees.
    layout: of mosaics. shown: the pictures, [N, C, H, W] in -1 ... 1, and the teacher's (None: there are none)."""
    found: dict[str, Tensor] = {}
    other = score.name != TEACHER
    if other:
        found["distance"] = (score.drawn - teacher.drawn).double().square().flatten(1).mean(1).sqrt()
    if score.error_MS is not None:
        found["trajectory"] = score.error_MS.mean(1)
    if shown is not None:
        own, known = shown
        if other:
            few = list(zip(own.split(PART), known.split(PART)))
            found["psnr"], found["ssim"] = (torch.cat([of(a, b) for a, b in few]) for of in (judges.psnr, judges.ssim))
        if judge is not None and layout is not None:
            seen, features = mosaics.seen(layout.tiles(own), judge, judge.crop)
            seen_T, features_T = mosaics.seen(layout.tiles(known), judge, judge.crop)
            found |= mosaics.figures(seen, seen_T, layout, labels_N)
            if other:
                found["cosine"] = torch.nn.functional.cosine_similarity(features, features_T, dim=-1).mean(1)
            else:
                del found["count_kept"], found["placement_kept"]
        elif judge is not None:
            logits, features = judge(own)
            logits_T, features_T = judge(known)
            if other:
                found["cosine"] = torch.nn.functional.cosine_similarity(features, features_T, dim=-1)
                found["agreement"] = (logits.argmax(-1) == logits_T.argmax(-1)).float()
            if labels_N is not None:
                found["top1"] = (logits.argmax(-1) == labels_N).float()
    return Samples(score.name, {key: Sample(value.double()) for key, value in found.items()})


def of_sets(
    shown: tuple[Tensor, Tensor], networks: Mapping[str, Any], layout: mosaics.Layout | None = None
) -> dict[str, float]:
    """Figures of pictures (of mosaics: of those in them) as a set against the teacher's, the second. networks: "" and
    "random"."""
    if len(shown[0]) < 3:
        return {}
    found: dict[str, float] = {}
    if layout is not None:
        shown = (layout.tiles(shown[0]).flatten(0, 1), layout.tiles(shown[1]).flatten(0, 1))
    for name, network in networks.items():
        own, known = (judges.features_of(network, pictures) for pictures in shown)
        end = f"_{name}" if name else ""
        found[f"frechet{end}"] = judges.frechet(known, own)
        found[f"kernel{end}"] = judges.kernel_distance(known, own)
        if not name:
            found["recall"], found["coverage"] = judges.recall_coverage(known, own)
    return found
