"""`linearize eval --suite recall`: a converted folder against its teacher, windows and its own branches on texts that
ask for what they held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.answers import Recalled
from linearize.data import text
from linearize.evaluate import quality
from linearize.evaluate.recall import tasks
from linearize.evaluate.recall.suite import Settings, measure
from linearize.measuring import Reopened, about, reopen, variants
from linearize.report import recall
from linearize.types import InputError, Unsupported


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

    asked: tasks, lengths, depths, trials, pairs, as in `Settings`. haystack: a source of real text, for S-NIAH-2 and
    -3 and for perplexity by position; without it they are refused where named, and left out, with a note, where not.
    The teacher is asked up to its own positions (allow_longer: everywhere). Raises InputError, Unsupported,
    StorageError.
    """
    if suite != "recall":
        raise InputError(f"--suite {suite}: there are recall, layers and lm-eval")
    settings, notes = Settings.read(seed=seed, **asked), []
    if haystack is None and (left := [name for name in settings.tasks if tasks.TASKS[name].haystack == "text"]):
        if asked.get("tasks") is not None:
            raise InputError(f"{', '.join(left)}: the needle is hidden in real text; name a file of it with --haystack")
        settings = replace(settings, tasks=tuple(name for name in settings.tasks if name not in left))
        notes.append(f"{', '.join(left)} left out: no --haystack")
    sentences = [s for one in text.read_texts(haystack) for s in tasks.sentences(one)] if haystack is not None else []
    found = reopen(
        model, {}, teacher=teacher, adjust=adjust, device=device, seed=seed, trust_remote_code=trust_remote_code
    )
    if found.plan.task != "text":
        raise Unsupported(f"the recall suite asks language models; this one is for {found.plan.task}")
    rows = rows_of(found, settings, sentences, allow_longer=allow_longer)
    done = recall.Recall(
        **about(model, found),
        seed=settings.seed,
        settings={**asdict(settings), "haystack": haystack},
        rows=rows,
        notes=notes,
    )
    return Recalled(done, recall.write(done, Path(model if output_dir is None else output_dir)))


def rows_of(
    found: Reopened, settings: Settings, sentences: Sequence[str], *, allow_longer: bool = False
) -> list[recall.Row]:
    """The table: the teacher, and `measuring.variants`."""
    _, student, base, _, _ = found
    others, bytes_of = variants(found)
    limit = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    first = text.first_token(base.processor)
    found_cells = measure(
        student.model, base.processor, settings, others, teacher=lambda: nullcontext(base.model),
        longest=None if allow_longer else limit, text=sentences, first=first,
    )  # fmt: skip
    read = {row.name: row for row in _read(found, others, sentences, max(settings.lengths))} if sentences else {}
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


def _read(found: Reopened, others: Any, sentences: Sequence[str], length: int) -> list[quality.Row]:
    """Perplexity on two documents as long as the longest question, of the real text end to end."""
    documents: list[Tensor] = text.documents([" ".join(sentences)], found.base.processor, length, cut=True, limit=2)
    return quality.compare(
        found.student.model, documents, others, teacher=lambda: nullcontext(found.base.model), batch=1,
        window=found.plan.eval.window, residual=0,
    )  # fmt: skip
