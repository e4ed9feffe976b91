"""Denoisers of images: what they draw, from the same noise as their teacher."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.data import drawing
from linearize.data.autoencoder import Decoder
from linearize.data.examples import Examples
from linearize.data.latents import Latents
from linearize.data.noise import Noising
from linearize.evaluate import drawings, encoders, judges, mosaics
from linearize.evaluate.quality import STUDENT, TEACHER, WINDOW
from linearize.mixers import base as mixers
from linearize.plan import Plan
from linearize.report import looks, schema
from linearize.surgery import plugin
from linearize.surgery.attach import Surgery
from linearize.tasks.base import HELD_OUT, Exam, Say, Task, Teacher, Variant, called
from linearize.types import InputError, Unsupported

#: columns of the picture grid
SHOWN = 10
#: of the held-out file: what it is no example without
_FACTS = "positions"
_NAMES = {"top1": "accuracy", "top1_ratio": "retained"}


class Drawn(Exam):
    """Conditions and seeds that teacher and student draw from."""

    unit = "drawings"
    followed = "distance to the teacher's drawings"

    def __init__(
        self,
        data: Latents,
        plan: Plan,
        scheduler: Any,
        noising: Noising,
        words: str = "",
        decoder: Decoder | None = None,
        why: str = "",
    ) -> None:
        """decoder: makes pictures of latents (None: these are pixels, or there is no picture of them, and `why`)."""
        self.data, self.plan, self.scheduler, self.noising, self.words = data, plan, scheduler, noising, words
        self.decoder, self.why = decoder, why
        finish = None if decoder is None else self._pictures
        self.studio = drawings.Studio(data, scheduler, plan.eval.steps, plan.eval.batch, finish)
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        self.judge = self.layout = None
        self.networks: dict[str, Any] = {}
        pixels = data.clean.ndim == 4 and data.clean.shape[1] in (1, 3)
        if not pixels and decoder is None:
            self.notes = (f"these are latents: figures of pictures need pixels, and are left out{why and f' ({why})'}",)
            return
        channels = data.clean.shape[1] if decoder is None else 3
        # A classifier of garments has nothing to say of what a latent model draws: there a judge has to be named.
        if decoder is None or plan.eval.judge is not None:
            self.judge = judges.Judge(plan.eval.judge, plan.eval.crop)
            self.networks[""] = self.judge
        self.networks["random"] = judges.Random(channels)
        if plan.eval.mosaic and self.judge is None:
            raise InputError("eval.mosaic: of latents a judge has to be named: a classifier of images (eval.judge)")
        if plan.eval.mosaic:
            self.layout = mosaics.Layout(plan.eval.mosaic)
            self.layout.tiles(self._pictures(data.clean[:1]))  # whether it fits

    def _pictures(self, drawn: Tensor) -> Tensor:
        return (drawn if self.decoder is None else self.decoder(drawn, self.data.shared)).clamp(-1, 1)

    def shown(self, score: drawings.Score) -> Tensor | None:
        """The pictures of a score, [N, C, H, W] in -1 ... 1, decoded once; None where latents stay latents."""
        if self.decoder is None:
            return self._pictures(score.drawn) if self.networks else None
        if score.name not in self._seen or self._seen[score.name][0] is not score.drawn:
            self._seen[score.name] = (score.drawn, self._pictures(score.drawn).half())  # hundreds of large pictures
        return self._seen[score.name][1].float()

    @property
    def count(self) -> int:
        return len(self.data)

    @property
    def example(self) -> dict[str, Tensor]:
        """Half noise."""
        batch = self.data.collate([self.data[0]])
        t = torch.tensor([self.noising.steps // 2])
        noise = drawing.noise_of(self.data.seeds[self.data.order][:1], self.data.clean.shape[1:])
        mixed = self.noising.mix(batch["hidden_states"], noise, t)
        return {**batch, "hidden_states": mixed, "timestep": self.noising.told(t)}

    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, *, progress: bool | None = None
    ) -> list[drawings.Score]:
        return self.studio.measure(model, variants, teacher, progress)

    @property
    def labels(self) -> Tensor | None:
        return self.data.conditions().get("class_labels")

    def _table(self, scores: Sequence[drawings.Score], seed: int, resamples: int = 1000) -> list[encoders.Row]:
        made = [
            drawings.samples(score, scores[0], self.labels, self.judge, self.layout, self._both(score, scores[0]))
            for score in scores
        ]
        return encoders.table(made, resamples=resamples, seed=seed)

    def _both(self, score: drawings.Score, teacher: drawings.Score) -> tuple[Tensor, Tensor] | None:
        own, known = self.shown(score), self.shown(teacher)
        return None if own is None or known is None else (own, known)

    def rows(self, scores: Sequence[drawings.Score], seed: int) -> list[schema.Row]:
        found = []
        for score, row in zip(scores, self._table(scores, seed), strict=True):
            figures: dict[str, Any] = {_NAMES.get(k, k): v for k, v in row.figures.items()}
            spans: dict[str, Any] = {_NAMES.get(k, k): v for k, v in row.intervals.items()}
            if score.name == TEACHER:
                figures.pop("retained", None)
                spans.pop("retained", None)
            if score.name != TEACHER and (both := self._both(score, scores[0])) is not None:
                figures |= drawings.of_sets(both, self.networks, self.layout)
            if score.error_MS is not None and self.studio.way is not None:
                figures["by_timestep"] = dict(zip(self.studio.way.times, score.error_MS.mean(0).tolist()))
            timed = scores if score.name == TEACHER else [score]  # the teacher was timed in turns with the student
            pairs = {n: both for other in timed for n, both in other.seconds.items()}
            figures["image_seconds"] = {n: both[int(score.name == TEACHER)] for n, both in pairs.items()}
            found.append(schema.Row(name=score.name, documents=len(score.drawn), intervals=spans, **figures))
        return found

    def pack(self, score: drawings.Score) -> dict[str, Tensor]:
        kept = {"drawn": score.drawn} | ({} if score.error_MS is None else {"error": score.error_MS})
        return kept | {f"seconds.{n}": torch.tensor(value) for n, value in score.seconds.items()}

    def unpack(self, name: str, tensors: dict[str, Tensor]) -> drawings.Score:
        timed = {int(k.partition(".")[2]): v.tolist() for k, v in tensors.items() if k.startswith("seconds.")}
        seconds = {n: (own, teachers) for n, (own, teachers) in timed.items()}
        score = drawings.Score(name, tensors["drawn"], tensors.get("error"), seconds)
        self.studio.known[name] = score
        return score

    def few(self, most: int) -> Drawn:
        return Drawn(
            self.data.take(0, most), self.plan, self.scheduler, self.noising, decoder=self.decoder, why=self.why
        )

    def follow(self, scores: Sequence[drawings.Score]) -> float:
        return float((scores[-1].drawn - scores[0].drawn).square().flatten(1).mean(1).sqrt().mean())

    def write(self, folder: Path) -> None:
        from safetensors.torch import save

        from linearize.storage import write_atomic

        kept = {**self.data.pack(), _FACTS: torch.tensor(self.data.positions)}
        write_atomic(folder / HELD_OUT, save(kept))


class Diffusion(Task):
    """Transformers (and UNets) of diffusers. processor: the scheduler, which says how noise is mixed in."""

    name = "diffusion"

    @property
    def noising(self) -> Noising:
        return Noising.of(self.processor, drawing.time_of(self.model))

    def read(self, given: Any, work: Path | None, say: Say) -> Latents:
        source = self.plan.data.source if given is None else given
        if isinstance(source, Latents):
            found = source
        elif isinstance(source, Examples) or not (source is None or isinstance(source, str | Path)):
            raise InputError("a denoiser learns from drawings: name a folder of linearize selfgen, or give Latents")
        elif source not in (None, "self"):
            found = drawing.read(source)
        else:
            found = self._own(work, say)
        found.check(self.model.config)
        return found

    def _own(self, work: Path | None, say: Say) -> Latents:
        data, model = self.plan.data, self.model
        config: Any = model.config
        size = drawing.positions_of(model, (config.in_channels, config.sample_size, config.sample_size))
        count = -(-data.self_tokens // size)
        folder = data.self_folder or (None if work is None else work / "drawings")
        say(f"the teacher draws {count:,} examples in {data.steps} steps each")
        return drawing.draw_classes(
            model, self.processor, count, seed=self.plan.seed if data.self_seed is None else data.self_seed,
            steps=data.steps, batch=data.self_batch, folder=folder,
        )  # fmt: skip

    def exam(self, valid: Examples | None) -> Drawn:
        if valid is not None:
            assert isinstance(valid, Latents)
            return self._drawn(valid.take(0, self.plan.eval.limit))
        source = self.plan.eval.source or self.plan.data.valid
        assert source is not None
        return self._drawn(drawing.read(source).take(0, self.plan.eval.limit))

    def kept(self, folder: Path) -> Drawn | None:
        from safetensors.torch import load

        if not (folder / HELD_OUT).is_file():
            return None
        kept = load((folder / HELD_OUT).read_bytes())
        return self._drawn(Latents.unpack(kept, int(kept[_FACTS]), {}).take(0, self.plan.eval.limit))

    def _drawn(self, data: Latents) -> Drawn:
        plan = self.plan
        name = called(plan.eval.source or plan.data.valid or plan.data.source, "the teacher's own conditions")
        if not hasattr(self.processor, "step"):
            raise InputError("this model came without a scheduler: pass one, convert(..., tokenizer=scheduler)")
        words = f"{name}: {len(data)} drawings of {plan.eval.steps} steps from the same noise, no guidance"
        decoder, why = self._decoder(data)
        exam = Drawn(data, plan, self.processor, self.noising, words, decoder, why)
        if decoder is not None:
            exam.words += ", decoded"
        if exam.networks:
            names = [network.name for network in (exam.judge, exam.networks["random"]) if network is not None]
            exam.words += f"; seen by {' and '.join(names)}"
        if exam.layout is not None:
            exam.words += f", picture by picture: mosaics laid out {exam.layout.text}"
        return exam

    def _decoder(self, data: Latents) -> tuple[Decoder | None, str]:
        """(what makes pictures of the model's latents or None, why there is none)."""
        try:
            found = Decoder.of(self.plan.model.id, self.plan.model.revision)
        except (InputError, Unsupported) as error:
            return None, str(error)
        if found is not None and not found.takes(self.model, data.clean, data.shared):
            return None, f"{type(self.model).__name__} arranges its latents in a way that is not decoded here"
        if found is not None:
            found.vae.to(next(self.model.parameters()).device)
        return found, ""

    @property
    def zero(self) -> list[tuple[str, str, dict[str, Any]]]:
        """A circle around each patch, untrained."""
        if any(site.shape.joint for site in _sites(self.model)) or "clear" not in mixers.names():
            return []
        return [(WINDOW, "clear", {"radius": self.plan.eval.window})]

    # ------------------------------------------------------------------------------------------------ reports
    def samples(self, surgery: Surgery, exam: Exam, teacher: Teacher) -> tuple[list[schema.Sample], None]:
        return [], None

    def diagnostics(self, surgery: Surgery, exam: Exam) -> looks.Diagnostics:
        assert isinstance(exam, Drawn)
        known = {n: exam.studio.known[n] for n in (TEACHER, "swapped", STUDENT) if n in exam.studio.known}
        rows = {n: pictures for n, score in known.items() if (pictures := exam.shown(score)) is not None}
        if not rows:
            return looks.Diagnostics()
        return looks.Diagnostics(grid=sheet(list(rows.values()), SHOWN), grid_rows=list(rows))

    # -------------------------------------------------------------------------------------------------- files
    def write(self, surgery: Surgery, folder: Path, revision: str | None) -> None:
        plan = self.plan.output
        lora = any("lora_" in name for name, _ in surgery.model.named_parameters())
        plugin.write(
            folder, {"": surgery}, surgery.method, surgery.config,
            lora="default" if plan.adapter_only and lora else None, whole=not plan.adapter_only,
        )  # fmt: skip
        self.processor.save_config(folder)


def _sites(model: nn.Module) -> list[Any]:
    from linearize.surgery.select import find

    try:
        return find(model)
    except Unsupported:
        return []


def sheet(rows: Sequence[Tensor], most: int) -> str:
    """Drawings [N, C, H, W] in -1 ... 1, a row each of at most so many columns: PNG in base64."""
    from PIL import Image as Pillow

    lines = [torch.cat(list(row[:most].clamp(-1, 1)), 2) for row in rows]
    whole = ((torch.cat(lines, 1) + 1) * 127.5).round().byte()
    array = whole[0].numpy() if whole.shape[0] == 1 else whole.permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Pillow.fromarray(array).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()
