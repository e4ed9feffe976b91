"""`linearize eval --suite recall`: a converted folder against its teacher, windows and its own branches on texts that
ask for what they held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.answers import Recalled
from linearize.data import text
from linearize.evaluate import quality
from linearize.evaluate.recall import tasks
from linearize.evaluate.recall.suite import Settings, measure
from linearize.measuring import Reopened, reopen
from linearize.report import provenance, recall, schema
from linearize.surgery.twin import twin
from linearize.types import InputError, Unsupported

EQUAL = "window of equal bytes"


def recalled(
    model: str | Path,
    *,
    suite: str = "recall",
    haystack: str | Path | None = None,
    teacher: str | Path | None = None,
    adjust: Mapping[str, Any] | Iterable[str] = (),
    allow_longer: bool = False,
    output_dir: str | Path | None = None,
    device: str = "auto",
    seed: int | None = None,
    trust_remote_code: bool = False,
    **asked: Any,
) -> Recalled:
    """Measure and write recall.json and recall.html into output_dir (None: the converted folder).

    asked: tasks, lengths, depths, trials, pairs, as in `Settings`. haystack: a source of real text, for the task
    "needle" and for perplexity by position. The teacher is asked up to its own positions (allow_longer: everywhere).
    Raises InputError, Unsupported, StorageError.
    """
    if suite != "recall":
        raise InputError(f"--suite {suite}: there are recall and layers")
    settings = Settings.read(seed=seed, **asked)
    found = reopen(
        model, {}, teacher=teacher, adjust=adjust, device=device, seed=seed, trust_remote_code=trust_remote_code
    )
    if found.plan.task != "text":
        raise Unsupported(f"the recall suite asks language models; this one is for {found.plan.task}")
    sentences = [s for one in text.read_texts(haystack) for s in tasks.sentences(one)] if haystack is not None else []
    left = () if sentences else tuple(n for n in settings.tasks if tasks.TASKS[n].haystack == "text")
    if left and len(left) == len(settings.tasks):
        raise InputError(f"{left[0]} hides its needle in real text: name a file of it with --haystack")
    if left:
        settings = Settings(**{**asdict(settings), "tasks": tuple(n for n in settings.tasks if n not in left)})
    notes = [f"{', '.join(left)} left out: no --haystack"] if left else []
    rows = rows_of(found, settings, sentences, allow_longer=allow_longer)
    base: Any = found.base.model.config
    done = recall.Recall(
        **provenance.gather(None, next(found.student.model.parameters()).device),
        name=Path(model).name,
        model=schema.Model(id=found.plan.model.id or "embedded", type=base.model_type),
        method=found.plan.method.name,
        plan_digest=found.plan.digest(),
        seed=settings.seed,
        trained={"tokens": sum(stage.tokens for stage in found.plan.stages), "length": found.plan.data.length},
        settings={**asdict(settings), "haystack": haystack},
        rows=rows,
        notes=notes,
    )
    return Recalled(done, recall.write(done, Path(model if output_dir is None else output_dir)))


def rows_of(
    found: Reopened, settings: Settings, sentences: Sequence[str], *, allow_longer: bool = False
) -> list[recall.Row]:
    """The table: teacher, windows without training (of the recipe's width, and of as many bytes as the student's
    state), the student, and each of its branches switched off."""
    plan, student, base, surgery, task = found
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
    variants = [
        *((name, partial(nullcontext, other)) for name, other in twins.items()),
        (quality.STUDENT, nullcontext),
        *((branch, partial(surgery.ablate, branch)) for branch in branches),
    ]
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    first = text.first_token(base.processor)
    found_cells = measure(
        student.model, base.processor, settings, variants, teacher=lambda: nullcontext(base.model),
        longest=None if allow_longer else limit, text=sentences, first=first,
    )  # fmt: skip
    read = {row.name: row for row in _read(found, variants, sentences, max(settings.lengths))} if sentences else {}
    return [
        recall.Row(
            name=name,
            cells=[recall.Cell(**asdict(cell)) for cell in cells],
            state_bytes=bytes_of.get(name),
            buckets=dict(read[name].buckets) if name in read else {},
            perplexity=read[name].perplexity if name in read else None,
            copy_nll=read[name].copy_nll if name in read else None,
        )
        for name, cells in found_cells.items()
    ]


def _read(found: Reopened, variants: Any, sentences: Sequence[str], length: int) -> list[quality.Row]:
    """Perplexity on two documents as long as the longest question, of the real text end to end."""
    documents: list[Tensor] = text.documents([" ".join(sentences)], found.base.processor, length, cut=True, limit=2)
    return quality.compare(
        found.student.model, documents, variants, teacher=lambda: nullcontext(found.base.model), batch=1,
        window=found.plan.eval.window, residual=0,
    )  # fmt: skip
