"""Standard tasks through lm-eval (the LM Evaluation Harness, 2405.14782), row by row on the same prompts.

Rows are variants as in `quality`. How a task asks and scores is its YAML file and lm-eval's own doing; this file hands
it models that are already in memory. lm-eval is an extra, imported here and nowhere else, when it is needed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.evaluate.quality import TEACHER, Variant, chosen, evaluating
from linearize.types import GateError, InputError, Unsupported, nearest

BATCH = 8  # requests in one forward pass
RESAMPLES = 1000  # for standard errors of what is no mean


@dataclass(frozen=True)
class Score:
    """One metric of one task for one variant, as lm-eval gives it. answers: the filter that picked the answers ("none":
    as they came). stderr: lm-eval's standard error over the documents, where it has one. asked: documents; shots:
    examples in each prompt."""

    task: str
    metric: str
    answers: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    asked: int
    shots: int


@dataclass(frozen=True)
class Loaded:
    """Tasks with their data. built: what lm-eval's `evaluate` takes."""

    built: dict[str, Any]
    version: str

    @property
    def writing(self) -> list[str]:
        """Tasks that let the model write, token by token."""
        return [n for n, task in self.built["tasks"].items() if getattr(task, "OUTPUT_TYPE", "") == "generate_until"]


def load(names: Sequence[str], folder: Path | None) -> Loaded:
    """The named tasks, groups or tags; of `folder` alone where one is given, else those that come with lm-eval (their
    data is on the hub).

    Data files that a task names are looked for beside its YAML files, in `folder`. Python that it names is run. Raises
    InputError where lm-eval is missing, a task is not there or cannot be loaded; Unsupported where it runs code that
    the model wrote, or asks about images.
    """
    if find_spec("lm_eval") is None:
        raise InputError("--suite lm-eval needs lm-eval: pip install 'linearize[eval]'")
    if not names:
        raise InputError("--suite lm-eval needs names of tasks: --tasks arc_easy,hellaswag")
    if folder is not None and not any(folder.rglob("*.yaml")):
        raise InputError(f"--task-files {folder}: no folder with YAML files of tasks in it")
    where = f"in {folder}" if folder is not None else "in lm-eval"
    with _quiet(), contextlib.chdir(folder or Path()):
        manager = importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=None if folder is None else ".", include_defaults=folder is None
        )
        for name in names:
            if name not in manager.all_tasks:
                hint = nearest(name, manager.all_tasks)
                hint = hint if len(hint) < 500 else "lm-eval ls tasks names them"
                raise InputError(f"no task {name!r} {where} ({hint}); YAML that cannot be read is passed over")
        try:
            built = manager.load(list(names))
        except Exception as error:  # a task is data and code of the user's: what is wrong with it is theirs to mend
            what = next(iter(str(error).splitlines()), "")
            raise InputError(f"--tasks {','.join(names)}: not loaded: {type(error).__name__}: {what}") from error
    for name, task in built["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise Unsupported(f"{name} runs code that the model writes; leave it out of --tasks")
        if getattr(task, "MULTIMODAL", False):
            raise Unsupported(f"{name} asks about images; leave it out of --tasks")
    return Loaded(built, importlib.import_module("lm_eval").__version__)


def measure(
    model: nn.Module,
    tokenizer: Any,
    tasks: Loaded,
    variants: Sequence[Variant],
    *,
    teacher: Callable[[], AbstractContextManager[Any]],
    positions: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, list[Score]], str]:
    """(by row, the teacher's first: its scores; a digest of the requests, the same for every row).

    positions: longer prompts lose their beginning, in every row alike (None: those of the model's config). limit:
    documents of each task. seed: of the examples in the prompts, and of sampling where a task samples. Raises
    InputError where the tokenizer has no token to begin with or the rows were not asked the same, GateError where
    logits are not finite.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("lm-eval needs a tokenizer with a token for the beginning or the end of a text (bos, eos)")
    found: dict[str, list[Score]] = {}
    digests: set[str] = set()
    with evaluating(model), _quiet():
        for name, enter in [(TEACHER, teacher), *variants]:
            with enter() as other, _seeded(seed), _without_cache(chosen(model, other)):
                asked = _harness(chosen(model, other), copy.deepcopy(tokenizer), positions, name)
                for task in tasks.built["tasks"].values():
                    task.set_fewshot_seed(seed=seed)
                said = importlib.import_module("lm_eval").evaluate(
                    lm=asked, task_dict=tasks.built, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
                )
            found[name] = _scores(said)
            digests.add(_digest(tasks))
    if len(digests) != 1:
        raise InputError("the rows were not asked the same: a task of --tasks makes new prompts each time")
    return found, digests.pop()


@contextlib.contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Scoring reads a text once and keeps nothing; lm-eval asks for a cache by itself where a task writes."""
    config = model.config.get_text_config()
    before, config.use_cache = getattr(config, "use_cache", True), False
    try:
        yield
    finally:
        config.use_cache = before


def _harness(model: nn.Module, tokenizer: Any, positions: int | None, name: str) -> Any:
    """lm-eval's wrapper of a transformers model, which refuses logits that are not finite."""
    base: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

    class Finite(base):
        def _model_call(self, *args: Any, **kwargs: Any) -> Tensor:
            logits = super()._model_call(*args, **kwargs)
            if not logits.isfinite().all():
                raise GateError(f"row {name!r}: logits are not finite; look for NaN or inf in the model's weights")
            return logits

    return Finite(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH, max_length=positions)


def _scores(said: dict[str, Any]) -> list[Score]:
    """Every number of lm-eval's results, tasks and groups alike, in its order."""
    found = []
    for task, values in said["results"].items():
        documents = said["n-samples"].get(task, {}).get("effective", values.get("sample_len", 0))
        for key, value in values.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{metric}_stderr,{answers}")
            found.append(
                Score(
                    task=task,
                    metric=metric,
                    answers=answers,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=said["higher_is_better"].get(task, {}).get(metric),
                    asked=documents,
                    shots=said["n-shot"].get(task) or 0,
                )
            )
    return found


def _digest(tasks: Loaded) -> str:
    """SHA-256 of all requests, in order."""
    found = hashlib.sha256()
    for name, task in tasks.built["tasks"].items():
        for request in task.instances:
            found.update(repr((name, request.request_type, request.args)).encode())
    return found.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What lm-eval prints goes to stderr, its warnings about models in memory nowhere; resampling stays in this
    process."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside; those outside go on as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
