"""The road from a model to a converted folder: load -> data -> surgery -> stages -> measure -> report -> folder.

Every step is a function of the plan and the inputs, so a run that was killed continues from what its work folder
holds and ends with the same weights.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from linearize import models, tasks
from linearize.answers import Resolved
from linearize.data.autoencoder import Decoder
from linearize.data.examples import Examples
from linearize.data.noise import Noising
from linearize.data.selfgen import fingerprint
from linearize.evaluate import quality
from linearize.measuring import Measure, Work, rivals
from linearize.ops import _dispatch as dispatch
from linearize.plan import FinetunePlan, Plan, TransferPlan
from linearize.report import card, html, provenance, schema, verdict
from linearize.resolve import choose, fitting
from linearize.stages import targets
from linearize.stages.base import Job, Processes
from linearize.stages.denoising import check_teacher
from linearize.stages.finetune import finetune
from linearize.stages.merge import merge
from linearize.stages.transfer import transfer
from linearize.storage import atomic_folder, check_target, write_atomic
from linearize.surgery.attach import Surgery, attach
from linearize.surgery.port import CHILD
from linearize.surgery.select import break_even
from linearize.tasks import Exam, Task
from linearize.tasks.base import called
from linearize.types import GateError, InputError, Site, StageReport, Unsupported

if TYPE_CHECKING:
    from linearize.report.schema import Report


@dataclass
class Converted:
    """What `convert` gives back. folder is None where nothing was to be written."""

    model: nn.Module
    surgery: Surgery
    report: Report
    processor: Any = None
    folder: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**self.report.model_dump(mode="json"), "folder": None if self.folder is None else str(self.folder)}

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the folder; returns its address. options: those of huggingface_hub's create_repo (private, ...).

        Raises InputError where no folder was written, or the card is not fit to be shown.
        """
        from huggingface_hub import HfApi

        if self.folder is None:
            raise InputError("nothing was written to upload: convert with output_dir=...")
        card.check_card(self.folder / "README.md")
        hub = HfApi()
        hub.create_repo(repository, exist_ok=True, **options)
        return str(hub.upload_folder(repo_id=repository, folder_path=self.folder))

    def render(self) -> Any:
        from linearize.report.summary import summary

        return summary(self.report, self.folder)


def run(
    resolved: Resolved,
    *,
    model: nn.Module | None = None,
    processor: Any = None,
    data: str | Path | Sequence[Any] | Examples | None = None,
    device: str = "auto",
    resume: bool = False,
    trust_remote_code: bool = False,
    command: list[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    on_step: Callable[[str, int], None] = lambda stage, step: None,
) -> Converted:
    """Carry out a resolved plan. Raises InputError, Unsupported, GateError, StorageError; whatever happens, the output
    folder is there whole or not at all, and the work folder holds the last good checkpoint."""
    plan, calls = resolved.plan, dispatch.calls.copy()
    target = None if plan.output.folder is None else Path(plan.output.folder)
    processes = Processes(device)
    work = Work(None)
    if target is not None:
        if resume and (target / "report.json").is_file():
            return _finished(target, plan)
        with processes.in_turn():
            work = _work(target, resume, check=processes.first)
    origin = resolved.source
    if model is None:
        assert origin is not None
        say(f"loading {origin.id or 'the embedded teacher'}")
        loaded = models.load_model(origin, dtype=plan.model.dtype, device=device, trust_remote_code=trust_remote_code)
        model, processor = loaded.model, processor or loaded.processor
        resolved = replace(resolved, notes=(*resolved.notes, *loaded.notes), revision=loaded.revision)
    assert model is not None
    if processor is None and not isinstance(data, Examples):
        processor = models.processor_of_model(model, plan.task)
    model.eval()

    sites, chosen, left = choose(plan, model)
    plan, idle = fitting(plan, chosen, resolved.recipe)
    if plan.task == "text" and plan.stages and not plan.eval.window_only:
        idle.append(f"{quality.WINDOW_ONLY}: none was trained by as many tokens (eval.window_only=true does)")
    resolved = replace(resolved, plan=plan, notes=(*resolved.notes, *idle))
    say(f"{len(chosen)} of {len(sites)} attention layers will be converted to {plan.method.name}")
    original = fingerprint(model)
    task = tasks.of(plan.task)(plan, model, processor, models.home(model, origin))
    with _tidy(work):
        with torch.random.fork_rng(devices=[]):  # a method that does not fit is refused before data are made for it
            attach(model, chosen, plan.method.name, plan.mixer()).detach()
        with processes.in_turn():
            train_data, valid = task.read(data, work.folder, say), None
            reports = [] if train_data.made is None else [train_data.made]
            if task.held_out:
                train_data, valid = train_data.hold_out(plan.data.valid_tokens)
        for stage in plan.stages if task.pool is not None else ():
            if isinstance(stage, FinetunePlan):
                targets.check(model, train_data, stage)
        others = _teachers(plan, task, device, trust_remote_code)
        for name in others:
            resolved = replace(resolved, notes=(*resolved.notes, f"fine-tuned on the answers of {called(name, name)}"))
        exam = task.exam(valid)
        resolved = replace(resolved, notes=tuple(dict.fromkeys((*resolved.notes, *train_data.notes, *exam.notes))))
        known = "".join(fingerprint(other) for other in others.values())
        digest = hashlib.sha256(f"{plan.digest()}{original}{train_data.digest}{known}".encode()).hexdigest()
        with processes.in_turn():
            _check_digest(work, digest)

        full = any(isinstance(stage, FinetunePlan) and stage.mode == "full" for stage in plan.stages)
        frozen = copy.deepcopy(model) if full else None  # full fine-tuning changes what LoRA would leave alone
        surgery = attach(model, chosen, plan.method.name, plan.mixer())
        teacher = surgery.teacher if frozen is None else lambda: nullcontext(frozen)
        measure = Measure(plan, work, exam, surgery, teacher, processes.first)
        job = Job(
            model=model, surgery=surgery, data=train_data, pool=task.pool, noising=task.noising, teachers=others,
            seed=plan.seed, work=work.sub("checkpoints"), digest=digest, resume=work.folder is not None,
            on_step=measure.along(train_data.mean, on_step),
        )  # fmt: skip
    measure.add(("swapped", nullcontext))
    beaten = rivals(task, job, frozen, say)
    for index, (name, stage) in enumerate(zip(plan.stage_names(), plan.stages, strict=True)):
        say(f"stage {name}: {stage.tokens:,} tokens in {stage.steps(train_data.mean):,} steps")
        reports.append(run_stage(job, stage, name))
        if stage.kind == "transfer" and index + 1 < len(plan.stages):
            measure.add(("after transfer", nullcontext))
    say("measuring the student, its branches and its baselines")
    branches = sorted({branch for mixer in surgery.mixers.values() for branch in mixer.branches})
    measure.add(
        (quality.STUDENT, nullcontext),
        *((branch, functools.partial(surgery.ablate, branch)) for branch in branches),
        *((name, lambda twin=twin: nullcontext(twin)) for name, twin in beaten.items()),
    )
    report = _report(resolved, job, task, sites, left, measure, reports, command)
    report.implementations = dispatch.used(calls)
    if target is not None and processes.first:
        say(f"writing {target}")
        _write(target, work, job, task, report, exam if valid is not None else None)
        if work.folder is not None:
            shutil.rmtree(work.folder, ignore_errors=True)
    processes.wait()
    done = Converted(model, surgery, report, processor, target)
    try:
        verdict.enforce(report.verdict)
    except GateError as error:
        error.answer = done  # the table is worth seeing all the same
        raise
    return done


def _teachers(plan: Plan, task: Task, device: str, trust_remote_code: bool) -> dict[str, nn.Module]:
    """The other models whose answers stages learn. Raises InputError where one cannot teach this model."""
    found: dict[str, nn.Module] = {}
    for stage in plan.stages:
        name = stage.teacher if isinstance(stage, FinetunePlan) else None
        if name is None or name in found:
            continue
        other = models.load_model(name, dtype=plan.model.dtype, device=device, trust_remote_code=trust_remote_code)
        if other.task != "diffusion":
            raise InputError(f"stages.finetune.teacher: {name} is for {other.task}: name a denoiser")
        assert task.noising is not None
        check_teacher(
            called(name, name), task.model, other.model,
            (task.noising, Noising.of(other.processor, task.noising.time)),
            (Decoder.of(plan.model.id, plan.model.revision), Decoder.of(name)),
        )  # fmt: skip
        found[name] = other.model.requires_grad_(False)
    return found


def _finished(target: Path, plan: Plan) -> Converted:
    """What is in the folder of a run that had ended before it was resumed."""
    report, model = schema.read(target, schema.Report), models.load(target)
    surgery = Surgery.of(model)
    assert surgery is not None
    if report.plan_digest != fitting(plan, surgery.sites, report.recipe)[0].digest():
        raise InputError(f"{target} holds the result of another plan: choose another --output-dir")
    shutil.rmtree(work_folder(target), ignore_errors=True)
    return Converted(model, surgery, report, None, target)


def run_stage(job: Job, stage: TransferPlan | FinetunePlan, name: str) -> StageReport:
    """One stage of a plan on a job."""
    return transfer(job, stage, name) if isinstance(stage, TransferPlan) else finetune(job, stage, name)


# ------------------------------------------------------------------------------------------------- the work folder
def work_folder(target: Path) -> Path:
    """Where an unfinished run of this output folder lives."""
    return target.parent / f".{target.name}.work"


def _work(target: Path, resume: bool, check: bool) -> Work:
    folder = work_folder(target)
    if check:
        check_target(target)
    if check and folder.exists() and any(folder.iterdir()) and not resume:
        raise InputError(
            f"an unfinished run for {target} is in {folder}: go on with --resume, choose another --output-dir, or "
            "delete it"
        )
    return Work(folder)


@contextmanager
def _tidy(work: Work) -> Iterator[None]:
    """Input that turns out to be bad before anything was trained leaves no work folder behind, unless one was there."""
    new = work.folder is not None and not work.folder.exists()
    try:
        yield
    except (InputError, Unsupported):
        if new and work.folder is not None:
            shutil.rmtree(work.folder, ignore_errors=True)
        raise


def _check_digest(work: Work, digest: str) -> None:
    path = work.sub("digest.json")
    if path is None:
        return
    if path.is_file():
        if json.loads(path.read_text()) != digest:
            raise InputError(
                f"{work.folder} holds a run of another plan, model or data: choose another --output-dir, or delete it"
            )
        return
    write_atomic(path, json.dumps(digest))


# ------------------------------------------------------------------------------------------------------- reporting
def _report(
    resolved: Resolved,
    job: Job,
    task: Task,
    sites: list[Site],
    left: dict[str, str],
    measure: Measure,
    stages: list[StageReport],
    command: list[str] | None,
) -> Report:
    plan, model, surgery = resolved.plan, job.model, job.surgery
    rows = measure.rows()
    cached = [site for site in sites if site.shape.causal]  # nobody decodes with the others
    window = next((row for row in rows if row.name == quality.WINDOW), None)
    if window is not None and cached:
        window.cache_bytes = {n: sum(_window_bytes(s, plan) for s in cached) for n in plan.eval.lengths}
    sample, written = task.samples(surgery, measure.exam, measure.teacher)
    converted = {site.name for site in surgery.sites}
    evens = [break_even(s, type(surgery.mixers[s.name]), surgery.config) for s in surgery.sites if s.shape.causal]
    even = next((n for n in evens if n), None)
    return schema.Report(
        **provenance.gather(command, next(model.parameters()).device),
        model=schema.Model(
            id=plan.model.id or ("embedded" if resolved.source is not None else type(model).__name__),
            source="object" if resolved.source is None else resolved.source.kind,
            revision=resolved.revision,
            type=models.type_of(model),
            parameters=sum(p.numel() for n, p in model.named_parameters() if CHILD not in n and "lora_" not in n),
            layers=len(sites),
            converted=len(converted),
            dtype=str(model.dtype).removeprefix("torch."),
            license=None if (origin := resolved.source or _origin(model)) is None else card.license_of(origin),
        ),
        task=plan.task,
        method=plan.method.name,
        recipe=resolved.recipe,
        plan_digest=plan.digest(),
        seeds=[plan.seed],
        evaluation=measure.exam.words,
        rows=rows,
        stages=[schema.stage(stage) for stage in stages],
        state={n: _bytes(cached, surgery, n) for n in plan.eval.lengths} if cached else {},
        break_even=even,
        sample=sample,
        generation=written,
        curves=measure.curves(),
        verdict=verdict.judge(rows, plan.gate.model_dump()),
        notes=list(resolved.notes),
        plan=plan.model_dump(mode="json"),
        sites=[
            schema.SiteInfo(
                name=s.name, layer=s.layer, converted=s.name in converted, why=left.get(s.name), drops=list(s.drops)
            )
            for s in sites
        ],
        diagnostics=task.diagnostics(surgery, measure.exam),
    )


def _origin(model: nn.Module) -> models.Source | None:
    """Where a model in hand says it came from, if it was really loaded from there: any model may bear any name."""
    from huggingface_hub import try_to_load_from_cache

    name = getattr(model, "name_or_path", "")
    try:
        found = models.source(name) if name else None
        if found is None or found.kind != "hub":
            return found
        return found if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except (InputError, ValueError):  # nothing there, or no name that the hub allows
        return None


def _bytes(sites: list[Site], surgery: Surgery, tokens: int) -> schema.Bytes:
    mixers = surgery.mixers
    kept = sum(mixers[s.name].state_bytes(tokens) if s.name in mixers else s.kv_bytes(tokens) for s in sites)
    return schema.Bytes(state_bytes=kept, kv_bytes=sum(s.kv_bytes(tokens) for s in sites))


def _window_bytes(site: Site, plan: Plan) -> int:
    return site.shape.kv_bytes(plan.eval.window + plan.eval.sinks)


def _write(target: Path, work: Work, job: Job, task: Task, report: Report, held_out: Exam | None) -> None:
    """The output folder, whole or not at all."""
    plan = task.plan
    with atomic_folder(target, part=work.sub("output")) as folder:
        if not plan.output.adapter_only and any("lora_" in name for name, _ in job.model.named_parameters()):
            merge(job.model)
        task.write(job.surgery, folder, report.model.revision)
        if held_out is not None:
            held_out.write(folder)
        write_atomic(folder / "resolved_recipe.yaml", plan.dump())
        schema.write(report, folder / "report.json")
        html.write_html(report, folder / "report.html")
        card.write_card(report, folder, adapter=plan.output.adapter_only)
