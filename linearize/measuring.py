"""The rows of a conversion's table: which variants are measured, and that a finished one is never measured again; and
a finished conversion opened again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from linearize import models, recipe, tasks
from linearize.evaluate import quality
from linearize.evaluate.diagnostics import dense_maps
from linearize.evaluate.layers import Layer, layers
from linearize.plan import FinetunePlan, Plan
from linearize.report import maps, provenance, schema
from linearize.stages.base import Job
from linearize.stages.finetune import finetune
from linearize.storage import check_target, write_atomic
from linearize.surgery.attach import Surgery
from linearize.surgery.twin import twin
from linearize.tasks import Exam, Task
from linearize.tasks.base import Variant
from linearize.types import InputError, Unsupported

CURVED = 24  # examples that a curve is followed on
EQUAL = "window of equal bytes"


@dataclass
class Work:
    """The folder beside the output that makes a run resumable; None where nothing is written."""

    folder: Path | None

    def sub(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


class Reopened(NamedTuple):
    """A folder that convert wrote, with its teacher."""

    plan: Plan
    student: Any
    base: Any
    surgery: Surgery
    task: Task


class Opened(NamedTuple):
    """A folder that convert wrote, with its teacher and what both are measured on."""

    plan: Plan
    student: Any
    base: Any
    surgery: Surgery
    task: Task
    exam: Exam


def open_converted(model: Any, asked: Mapping[str, Any], **options: Any) -> Opened:
    """`reopen`, and what the recipe measures on. Raises InputError, StorageError."""
    found = reopen(model, asked, **options)
    exam = found.task.kept(Path(model)) if found.task.held_out else found.task.exam(None)
    if exam is None:
        raise InputError("this folder holds nothing to measure on: name data with --dataset")
    return Opened(*found, exam)


def reopen(
    model: Any,
    asked: Mapping[str, Any],
    *,
    teacher: str | Path | None = None,
    adjust: Mapping[str, Any] | Iterable[str] = (),
    device: str = "auto",
    seed: int | None = None,
    trust_remote_code: bool = False,
) -> Reopened:
    """asked: keys of `eval` in place of the recipe's, where not None. adjust: settings of the mixers, or lines
    "key=value". Raises InputError, StorageError."""
    if not isinstance(model, str | Path) or not (Path(model) / "resolved_recipe.yaml").is_file():
        raise InputError(f"{model} is no folder that convert wrote: it has no resolved_recipe.yaml")
    folder = Path(model)
    plan = Plan.read(folder / "resolved_recipe.yaml")
    changed = {k: v for k, v in asked.items() if v is not None}
    if "source" in changed:
        changed = {"split": None, **changed, "parts": {}}
    plan = plan.model_copy(
        update={"eval": plan.eval.model_copy(update=changed), "seed": plan.seed if seed is None else seed}
    ).checked()
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code, "task": plan.task}
    student = models.load_converted(folder, **options)
    surgery = Surgery.of(student.model)
    assert surgery is not None
    if settings := dict(recipe.pairs(adjust)):
        surgery.adjust(settings)
    base = models.load_model(teacher or plan.model.id, dtype=student.model.dtype, **options)
    task = tasks.of(plan.task)(plan, base.model, base.processor, models.home(base.model, base.source))
    return Reopened(plan, student, base, surgery, task)


def variants(found: Reopened) -> tuple[list[Variant], dict[str, int]]:
    """(the rows beside the teacher's, the bytes that each keeps): windows without training (of the recipe's width, and
    of as many bytes as the student's state), the student, and each of its branches switched off."""
    plan, _, base, surgery, task = found
    state = sum(mixer.state_bytes(0) for mixer in surgery.mixers.values())
    per_token = sum(site.kv_bytes(1) for site in surgery.sites)
    equal = max(plan.eval.sinks + 1, state // per_token)
    windows = [*task.zero, (EQUAL, "window", {"window": equal - plan.eval.sinks, "sinks": plan.eval.sinks})]
    bytes_of = {
        quality.STUDENT: state,
        **{name: per_token * (config["window"] + config["sinks"]) for name, _, config in windows},
    }
    twins = {name: twin(base.model, method, config, surgery.sites) for name, method, config in windows}
    branches = sorted({branch for mixer in surgery.mixers.values() for branch in mixer.branches})
    rows: list[Variant] = [
        *((name, partial(nullcontext, other)) for name, other in twins.items()),
        (quality.STUDENT, nullcontext),
        *((branch, partial(surgery.ablate, branch)) for branch in branches),
    ]
    return rows, bytes_of


def about(model: str | Path, found: Reopened) -> dict[str, Any]:
    """What the result file of a suite says of the converted folder `model`: provenance, name, teacher, training."""
    return {
        **provenance.gather(None, next(found.student.model.parameters()).device),
        "name": Path(model).name,
        "model": schema.Model(id=found.plan.model.id or "embedded", type=found.base.model.config.model_type),
        "method": found.plan.method.name,
        "plan_digest": found.plan.digest(),
        "trained": {"tokens": sum(stage.tokens for stage in found.plan.stages), "length": found.plan.data.length},
    }


def compare_layers(model: Any, asked: Mapping[str, Any], *, tokens: int = 256, **options: Any) -> list[Layer]:
    """Layer by layer, on the first `tokens` of the longest four documents measured on. Raises InputError, StorageError,
    Unsupported."""
    found = open_converted(model, asked, **options)
    documents = getattr(found.exam, "documents", None)
    if documents is None:
        raise Unsupported(f"layers are compared in language models; this one is for {found.plan.task}")
    return layers(found.surgery, [ids[:tokens] for ids in sorted(documents, key=len)[-4:]])


def write_attention(
    model: Any, target: str | Path, data: str | None, adjust: Mapping[str, Any] | Iterable[str], trust_remote_code: bool
) -> list[str]:
    """Maps of every head on one example, as numbers and pictures: the files' names. Raises InputError, StorageError."""
    check_target(target)
    found = open_converted(model, {"source": data}, adjust=adjust, trust_remote_code=trust_remote_code)
    numbers = {place if s.layer is None else s.layer: s.shape.heads for place, s in enumerate(found.surgery.sites)}
    wanted = {layer: range(heads) for layer, heads in numbers.items()}
    return maps.write(dense_maps(found.surgery, found.exam.example, wanted), Path(target))


class Measure:
    """Scores of every row on the same examples; those of a finished step are kept in the work folder."""

    def __init__(
        self, plan: Plan, work: Work, exam: Exam, surgery: Surgery, teacher: Callable[[], Any], writes: bool = True
    ) -> None:
        self.plan, self.work, self.exam, self.surgery, self.teacher = plan, work, exam, surgery, teacher
        for name, span in plan.eval.parts.items():  # now, not when everything is trained
            if not (first := int(span.split("-")[0])) <= int(span.split("-")[1]) or first >= exam.count:
                raise InputError(f"eval.parts.{name}: {span} is none of the {exam.count} {exam.unit}, numbered from 0")
        self.writes = writes  # one of several processes does
        self.scores: dict[str, Any] = {}
        self.points: dict[int, float] = {}  # what the exam follows, by tokens trained

    def add(self, *variants: Variant) -> None:
        self._recall(quality.TEACHER)
        missing = [v for v in variants if not self._recall(v[0])]
        if not missing:
            return
        for score in self.exam.measure(self.surgery.model, missing, self.teacher):
            if score.name not in self.scores:
                self.scores[score.name] = score
                self._keep(score)

    def _path(self, name: str) -> Path | None:
        return self.work.sub(f"scores/{name.replace(' ', '-')}.safetensors")

    def _keep(self, score: Any) -> None:
        from safetensors.torch import save

        if self.writes and (path := self._path(score.name)) is not None:
            tensors = {k: v.contiguous().clone() for k, v in self.exam.pack(score).items()}
            write_atomic(path, save(tensors))

    def _recall(self, name: str) -> bool:
        from safetensors.torch import load

        path = self._path(name)
        if path is None or not path.is_file():
            return name in self.scores
        self.scores[name] = self.exam.unpack(name, load(path.read_bytes()))
        return True

    def rows(self) -> list[schema.Row]:
        """The table, the teacher first."""
        scores = [self.scores[quality.TEACHER], *(s for n, s in self.scores.items() if n != quality.TEACHER)]
        return self.exam.rows(scores, self.plan.seed)

    # ------------------------------------------------------------------------------------- the curve along training
    def along(self, length: float, on_step: Callable[[str, int], None]) -> Callable[[str, int], None]:
        """`on_step`, and behind it a point of the curve after every `eval.curve` tokens. length: of an example, on
        average."""
        every = self.plan.eval.curve
        if every is None:
            return on_step
        names = self.plan.stage_names()
        sizes = [stage.batch * length for stage in self.plan.stages]
        starts = [0]
        for stage, size in zip(self.plan.stages, sizes, strict=True):
            starts.append(starts[-1] + stage.steps(length) * size)

        def then(stage: str, step: int) -> None:
            on_step(stage, step)
            if stage not in names:
                return
            index = names.index(stage)
            tokens = starts[index] + step * sizes[index]
            if tokens // every != (tokens - sizes[index]) // every or tokens == starts[index + 1]:
                self.points[round(tokens)] = self._figure()
                if self.writes and (path := self.work.sub("curve.json")) is not None:
                    write_atomic(path, json.dumps(self.points))

        path = self.work.sub("curve.json")
        if path is not None and path.is_file():
            self.points = {int(n): ratio for n, ratio in json.loads(path.read_text()).items()}
        return then

    def _figure(self) -> float:
        few = self.exam.few(CURVED)
        variants: list[Variant] = [(quality.STUDENT, nullcontext)]
        return few.follow(few.measure(self.surgery.model, variants, self.teacher, progress=False))

    def curves(self) -> dict[str, schema.Curve]:
        """What was followed along training; empty where nothing was."""
        if not self.points:
            return {}
        places = sorted(self.points)
        return {
            "ratio": schema.Curve(
                x_label="tokens",
                y_label=self.exam.followed,
                x=[float(n) for n in places],
                y=[self.points[n] for n in places],
            )
        }


def rivals(task: Task, job: Job, frozen: nn.Module | None, say: Callable[[str], None]) -> dict[str, nn.Module]:
    """What the student has to beat: modules that share the teacher's weights. Made before LoRA is injected."""
    plan, teacher = task.plan, job.model if frozen is None else frozen
    found = {name: twin(teacher, method, settings, job.surgery.sites) for name, method, settings in task.zero}
    if plan.eval.window_only and plan.stages:
        # A window has nothing to transfer: all of the tokens are fine-tuning, by default where the plan has none.
        last = plan.stage("finetune") or Plan.read({"task": plan.task}).stage("finetune")
        assert isinstance(last, FinetunePlan)
        tokens = sum(stage.tokens for stage in plan.stages)
        say(f"training a window-only student on the same {tokens:,} tokens")
        _, method, settings = next(zero for zero in task.zero if zero[0] == quality.WINDOW)
        rival = twin(teacher, method, settings, job.surgery.sites)
        if last.mode == "full":
            rival = copy.deepcopy(rival)
        surgery = Surgery.of(rival)
        assert surgery is not None
        finetune(
            replace(job, model=rival, surgery=surgery),
            last.model_copy(update={"tokens": tokens, "batch": plan.stages[-1].batch, "mixer_lr": None}),
            "window-only",
        )
        found[quality.WINDOW_ONLY] = rival
    return found
