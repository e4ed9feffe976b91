"""The one training loop: accelerate for devices and processes, checkpoints that survive a kill, exact resume.

Everything random is a function of (seed, stage, step), and the learning rate of the step, so that a checkpoint is only
the trained tensors, the optimiser's moments and a step number. It holds no pickle.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from linearize.plan import FinetunePlan, TransferPlan
from linearize.stages.base import Job, not_finite
from linearize.storage import atomic_folder
from linearize.types import InputError, StageReport

KEPT = 2  # checkpoints on disk
GROUPED = 64  # steps within which examples are sorted by length


class Objective(Protocol):
    """What a stage is to the loop."""

    name: str
    groups: list[tuple[dict[str, nn.Parameter], float]]  # named parameters and their peak learning rate

    def loss(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Named scalars; "loss" is minimised, the others are logged."""
        ...


class _Step(nn.Module):
    """One training step as a forward, so that DistributedDataParallel sees it whole."""

    def __init__(self, model: nn.Module, objective: Objective, autocast: bool) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast
        self.compute = objective.loss

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        if not self.autocast:
            return self.compute(batch, step)
        # Without a cache: the teacher's forward, which has no gradient and at times other weights, would fill it.
        kind = next(self.model.parameters()).device.type
        with torch.autocast(kind, torch.bfloat16, cache_enabled=False):
            return self.compute(batch, step)


class Order(Sampler[int]):
    """Indices of the examples of steps `first` to `last`, `batch` of them each: every epoch a new seeded permutation.

    sizes int64 [N]: lengths of the examples. Where they differ, each stretch of GROUPED steps (of an epoch, where that
    is less) is put in order of length, and its steps shuffled: a step holds examples of like length and hardly any
    padding. Each example still comes once before any comes a third time.
    """

    def __init__(
        self, size: int, seed: int, first: int, last: int, batch: int = 1, sizes: Tensor | None = None
    ) -> None:
        self.size, self.seed, self.batch = size, seed, batch
        self.first, self.last = first, last
        self.sizes = sizes if sizes is not None and batch > 1 and bool((sizes != sizes[0]).any()) else None

    def __len__(self) -> int:
        return (self.last - self.first) * self.batch

    def __iter__(self) -> Iterator[int]:
        stretch = max(1, min(GROUPED, self.size // self.batch))
        group, steps_SB = -1, torch.empty(0, self.batch)
        for step in range(self.first, self.last):
            if step // stretch != group:
                group = step // stretch
                steps_SB = self._stretch(group, stretch)
            yield from steps_SB[step % stretch].tolist()

    def _stretch(self, group: int, steps: int) -> Tensor:
        """The examples of `steps` steps, [steps, batch]."""
        places = torch.arange(group * steps * self.batch, (group + 1) * steps * self.batch)
        found = torch.empty_like(places)
        for epoch in (places // self.size).unique().tolist():
            here = places // self.size == epoch
            found[here] = torch.randperm(self.size, generator=self._generator(epoch))[places[here] % self.size]
        if self.sizes is None:
            return found.view(steps, self.batch)
        alike = found[self.sizes[found].argsort(stable=True)].view(steps, self.batch)
        return alike[torch.randperm(steps, generator=self._generator(-1 - group))]

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)


def rate(plan: TransferPlan | FinetunePlan, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then constant or half a cosine."""
    warm = math.ceil(plan.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if plan.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(job: Job, objective: Objective, plan: TransferPlan | FinetunePlan) -> StageReport:
    """Minimise the objective for plan.tokens processed tokens. Raises GateError on NaN, InputError for bad resumes."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

    name = objective.name
    length = job.data.mean
    steps = plan.steps(length)
    trained = {n: p for parameters, _ in objective.groups for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(p.values()), "lr": lr, "peak": lr} for p, lr in objective.groups],
        betas=(0.9, 0.95),
        weight_decay=plan.weight_decay,
    )
    report = StageReport(name)
    average = {n: p.detach().clone() for n, p in trained.items()} if plan.ema else {}
    done = _restore(job, name, trained, optimizer, report, average) if job.resume else 0
    if done >= steps:
        return report
    device = next(iter(trained.values())).device
    # Where a method has losses of its own, some parameters learn from those alone.
    apart = any(mixer.teaches for mixer in job.surgery.mixers.values())
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=False),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=apart)],
    )
    if plan.batch % accelerator.num_processes:
        raise InputError(f"batch {plan.batch} cannot be split over {accelerator.num_processes} processes")
    order = Order(len(job.data), job.seed, done, steps, plan.batch, job.data.sizes)
    loader = DataLoader(job.data, batch_size=plan.batch, sampler=order, drop_last=True, collate_fn=job.data.collate)
    step_module, optimizer, loader = accelerator.prepare(
        _Step(job.model, objective, plan.precision == "bfloat16"), optimizer, loader
    )
    started, saved = time.monotonic(), time.monotonic()
    before = report.seconds
    with _bar(job, accelerator.is_main_process, name, done, steps) as advance:
        for step, batch in enumerate(loader, start=done):
            share = rate(plan, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            torch.manual_seed(zlib.crc32(f"{job.seed}/{name}/{step}/{accelerator.process_index}".encode()))
            losses = step_module(batch, step)
            values = {k: float(v.detach()) for k, v in losses.items()}
            bad = next((k for k, v in values.items() if not math.isfinite(v)), None)
            if bad is not None:
                raise not_finite(f"stage {name}, step {step}: {bad}", job.model)
            accelerator.backward(losses["loss"])
            if plan.clip:
                accelerator.clip_grad_norm_(trained.values(), plan.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _follow(average, trained, min(plan.ema, (step + 1) / (step + 10)))
            if step + 1 == steps:
                _follow(trained, average, 0.0)
            _log(report, values, share)
            report.steps, report.tokens = step + 1, round((step + 1) * plan.batch * length)
            report.seconds = before + time.monotonic() - started
            advance(values["loss"])
            job.on_step(name, step + 1)
            finished = step + 1 == steps
            due = time.monotonic() - saved >= job.checkpoint_seconds
            if job.checkpoint_steps is not None:
                due = (step + 1) % job.checkpoint_steps == 0
            if job.work is not None and accelerator.is_main_process and (due or finished):
                _checkpoint(job, name, trained, optimizer, report, finished, average)
                saved = time.monotonic()
    accelerator.wait_for_everyone()
    for parameter in trained.values():
        if not torch.isfinite(parameter).all():
            raise not_finite(f"stage {name}", job.model)
    return report


@torch.no_grad()
def _follow(average: dict[str, Any], weights: dict[str, Any], keep: float) -> None:
    """average = keep * average + (1 - keep) * weights, of all that is in both."""
    for name in average.keys() & weights.keys():
        average[name].lerp_(weights[name], 1 - keep)


def _log(report: StageReport, values: dict[str, float], share: float) -> None:
    if math.isnan(report.first):
        report.first = values["loss"]
    report.last = values["loss"]
    for key, value in {**values, "rate": share}.items():
        report.series.setdefault(key, []).append(value)


class _Silent:
    def __call__(self, loss: float) -> None:
        pass


def _bar(job: Job, main: bool, name: str, done: int, steps: int) -> Any:
    """A progress bar on a terminal, nothing elsewhere."""
    if not (job.progress and main and sys.stderr.isatty()):
        return nullcontext(_Silent())
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bar():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(name, total=steps, completed=done, loss=math.nan)
            yield lambda loss: progress.update(task, advance=1, loss=loss)

    return bar()


# --------------------------------------------------------------------------------------------------- checkpoints
def _folders(job: Job, name: str) -> list[Path]:
    """Complete checkpoints of a stage, oldest first."""
    assert job.work is not None
    found = [p for p in job.work.glob(f"{name}-*") if (p / "progress.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _checkpoint(
    job: Job,
    name: str,
    trained: dict[str, nn.Parameter],
    optimizer: Any,
    report: StageReport,
    finished: bool,
    average: dict[str, Tensor],
) -> None:
    from safetensors.torch import save_file

    assert job.work is not None
    job.work.mkdir(parents=True, exist_ok=True)
    tensors = {f"parameter.{n}": p.detach().contiguous() for n, p in trained.items()}
    if not finished:
        for key, value in _moments(trained, optimizer).items():
            tensors[key] = value
        tensors |= {f"average.{n}": value.contiguous() for n, value in average.items()}
    progress = {"digest": job.digest, "finished": finished, "report": vars(report)}
    with atomic_folder(job.work / f"{name}-{report.steps:08d}", overwrite=True) as folder:
        save_file(tensors, folder / "tensors.safetensors")
        (folder / "progress.json").write_text(json.dumps(progress))
    for old in _folders(job, name)[: -1 if finished else -KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _moments(trained: dict[str, nn.Parameter], optimizer: Any) -> dict[str, Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): n for n, p in trained.items()}
    return {
        f"optimizer.{key}.{names[id(p)]}": value
        for p, state in inner.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _restore(
    job: Job,
    name: str,
    trained: dict[str, nn.Parameter],
    optimizer: Any,
    report: StageReport,
    average: dict[str, Tensor],
) -> int:
    """Load the newest complete checkpoint of the stage, if any; returns the number of finished steps."""
    from safetensors.torch import load_file

    if job.work is None or not (folders := _folders(job, name)):
        return 0
    progress = json.loads((folders[-1] / "progress.json").read_text())
    if progress["digest"] != job.digest:
        raise InputError(
            f"{job.work} holds checkpoints of another plan or other data; choose another --output-dir, or delete it"
        )
    tensors = load_file(folders[-1] / "tensors.safetensors")
    with torch.no_grad():
        for n, parameter in trained.items():
            parameter.copy_(tensors[f"parameter.{n}"])
            moments = {
                key.split(".", 2)[1]: value.clone()
                for key, value in tensors.items()
                if key.startswith("optimizer.") and key.split(".", 2)[2] == n
            }
            if moments:
                optimizer.state[parameter] = moments
        for n, value in average.items():
            value.copy_(tensors.get(f"average.{n}", trained[n]))
    vars(report).update(progress["report"])
    return report.steps


def finished(job: Job, name: str) -> bool:
    """Whether the stage's final checkpoint is there."""
    if job.work is None or not (folders := _folders(job, name)):
        return False
    return bool(json.loads((folders[-1] / "progress.json").read_text())["finished"])
