"""`linearize eval --suite lm-eval`: a converted folder against its teacher, windows and its own branches on standard
tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from linearize.answers import Scored
from linearize.evaluate import harness
from linearize.measuring import about, reopen, variants
from linearize.report import standard
from linearize.types import Unsupported


def scored(
    model: str | Path,
    *,
    tasks: str | Sequence[str] | None = None,
    task_files: str | Path | None = None,
    limit: int | None = None,
    teacher: str | Path | None = None,
    adjust: Mapping[str, Any] | Iterable[str] = (),
    output_dir: str | Path | None = None,
    device: str = "auto",
    seed: int | None = None,
    trust_remote_code: bool = False,
) -> Scored:
    """Measure and write lm-eval.json into output_dir (None: the converted folder).

    tasks: names of tasks, groups or tags, a list or words with commas. task_files: a folder of task YAML files, whose
    data files are looked for from there (None: the tasks that come with lm-eval, whose data is on the hub). limit:
    documents of each. Raises InputError, Unsupported, GateError, StorageError.
    """
    words = tasks.split(",") if isinstance(tasks, str) else list(tasks or ())
    names = list(dict.fromkeys(word.strip() for word in words if word.strip()))
    loaded = harness.load(names, None if task_files is None else Path(task_files))
    found = reopen(
        model, {}, teacher=teacher, adjust=adjust, device=device, seed=seed, trust_remote_code=trust_remote_code
    )
    if found.plan.task != "text":
        raise Unsupported(f"lm-eval asks language models; this one is for {found.plan.task}")
    others, bytes_of = variants(found)
    notes = []
    if loaded.writing:  # a branch alone has no state to write from
        branches = {branch for mixer in found.surgery.mixers.values() for branch in mixer.branches}
        others = [(name, enter) for name, enter in others if name not in branches]
        left = f"Branches are not switched off where a task writes ({', '.join(loaded.writing)})."
        notes = [left] if branches else []
    base = found.base.model
    scores, requests = harness.measure(
        found.student.model, found.base.processor, loaded, others, teacher=lambda: nullcontext(base),
        positions=getattr(base.config.get_text_config(), "max_position_embeddings", None), limit=limit,
        seed=found.plan.seed,
    )  # fmt: skip
    done = standard.Standard(
        **about(model, found),
        seed=found.plan.seed,
        lm_eval=loaded.version,
        requests=requests,
        settings={"tasks": names, "task_files": task_files, "limit": limit},
        rows=[
            standard.Row(
                name=name, scores=[standard.Score(**asdict(score)) for score in row], state_bytes=bytes_of.get(name)
            )
            for name, row in scores.items()
        ],
        notes=notes,
    )
    return Scored(done, standard.write(done, Path(model if output_dir is None else output_dir)))
