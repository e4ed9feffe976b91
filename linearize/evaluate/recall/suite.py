"""Whether a converted model finds again what its text held: exact match by task, length and depth, row by row.

Rows are variants as in `quality`: the teacher, windows without training, the student, the student with a branch off.
All of them read the same texts. A length counts for a claim only where the teacher itself is right on 90 % of at least
50 questions (report.recall): what the teacher cannot find says nothing about a student's memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.evaluate.quality import TEACHER, Variant, chosen, evaluating
from linearize.evaluate.recall.tasks import ALIASES, TASKS, Task, Trial, trial
from linearize.progress import bar
from linearize.types import GateError, InputError, nearest


@dataclass(frozen=True)
class Settings:
    """What is asked. trials: questions for each task and length, spread evenly over `depths` places of the needle.
    pairs: of MQAR, each a cell of its own (pairs stand first, questions last). tokens: of a forward pass, about."""

    tasks: tuple[str, ...] = ("passkey", "s-niah-1", "s-niah-2", "s-niah-3", "mqar")
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    depths: int = 3
    trials: int = 51
    pairs: tuple[int, ...] = (16,)
    seed: int = 0
    tokens: int = 16384

    def __post_init__(self) -> None:
        for name in self.tasks:
            if name not in TASKS:
                raise InputError(f"no recall task {name!r}: {nearest(name, list(TASKS))}")
        if min(self.depths, self.trials, *self.lengths, *self.pairs) < 1:
            raise InputError("recall: depths, trials, lengths and pairs must be 1 or more")

    @classmethod
    def read(cls, **given: Any) -> Settings:
        """From a command line: lists may be words with commas, None is the default; tasks by any of their names, once.
        Raises InputError."""
        asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        for key in ("tasks", "lengths", "pairs"):
            if (value := asked.get(key)) is None:
                continue
            words = [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)
            if key == "tasks":
                asked[key] = tuple(dict.fromkeys(ALIASES.get(word, word) for word in words))
                continue
            try:
                asked[key] = tuple(map(int, words))
            except ValueError:
                raise InputError(f"recall: {key} {value!r} are no numbers: write them as 1024,2048,4096") from None
        return cls(**asked)


@dataclass(frozen=True)
class Cell:
    """Questions answered right by one variant. depth: 0 to 1; None: the needle stands first. pairs: of MQAR."""

    task: str
    length: int
    depth: float | None
    pairs: int | None
    asked: int
    right: int


def cells(settings: Settings) -> Iterator[tuple[Task, int, float | None, int | None, int]]:
    """(task, length, depth, pairs, texts) of every cell. Cells of MQAR with more pairs than fit are left to fail."""
    for name in settings.tasks:
        task = TASKS[name]
        for length in settings.lengths:
            if task.pairs > 1:
                for pairs in settings.pairs:
                    yield task, length, None, pairs, math.ceil(settings.trials / pairs)
                continue
            for place in range(settings.depths):
                depth = 0.5 if settings.depths == 1 else place / (settings.depths - 1)
                yield task, length, depth, None, math.ceil(settings.trials / settings.depths)


def measure(
    model: nn.Module,
    tokenizer: Any,
    settings: Settings,
    variants: Sequence[Variant],
    *,
    teacher: Callable[[], AbstractContextManager[Any]],
    longest: int | None = None,
    text: Sequence[str] = (),
    first: int | None = None,
    progress: bool | None = None,
) -> dict[str, list[Cell]]:
    """By row, the teacher's first: what each got right.

    longest: the teacher reads no text longer than this (None: all). text: sentences of a real haystack. first: an id
    every text begins with. Raises InputError where a task does not fit into a length, GateError where logits are not
    finite.
    """
    found: dict[str, list[Cell]] = {TEACHER: [], **{name: [] for name, _ in variants}}
    plan = list(cells(settings))
    with evaluating(model), bar("recall", len(plan) * len(found), progress) as advance:
        for task, length, depth, pairs, texts in plan:
            trials = [
                trial(
                    task,
                    tokenizer,
                    length,
                    depth=depth or 0.0,
                    pairs=pairs,
                    seed=settings.seed * 10**6 + n,
                    text=text,
                    first=first,
                )  # fmt: skip
                for n in range(texts)
            ]
            for name, enter in [(TEACHER, teacher), *variants]:
                advance(1)
                if name == TEACHER and longest is not None and length > longest:
                    continue
                with enter() as other:
                    right = answered(chosen(model, other), trials, settings.tokens, name)
                found[name].append(Cell(task.name, length, depth, pairs, len(right), sum(right)))
    return found


def answered(model: nn.Module, trials: Sequence[Trial], tokens: int = 16384, name: str = "") -> list[bool]:
    """Of each question of each text, whether greedy decoding would answer it whole."""
    size = max(1, tokens // max(len(t.ids_T) for t in trials))
    right: list[bool] = []
    for at in range(0, len(trials), size):
        some = trials[at : at + size]
        ids_BT = torch.nn.utils.rnn.pad_sequence([t.ids_T for t in some], batch_first=True)
        mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor([len(t.ids_T) for t in some])[:, None]
        wanted = sorted({column - 1 for t in some for start, stop in t.answers for column in range(start, stop)})
        said_BN = _likeliest(model, ids_BT, mask_BT, torch.tensor(wanted), name)
        place = {column: n for n, column in enumerate(wanted)}
        for row, one in enumerate(some):
            for start, stop in one.answers:
                said = said_BN[row, [place[column - 1] for column in range(start, stop)]]
                right.append(bool((said == one.ids_T[start:stop]).all()))
    return right


def _likeliest(model: Any, ids_BT: Tensor, mask_BT: Tensor, columns_N: Tensor, name: str) -> Tensor:
    """The likeliest next token at these columns, [B, N] on the CPU. Other logits are left out where the model can."""
    device = next(model.parameters()).device
    mask = None if mask_BT.all() else mask_BT.long().to(device)
    few = "logits_to_keep" in inspect.signature(model.forward).parameters
    more = {"logits_to_keep": columns_N.to(device)} if few else {}
    logits = model(input_ids=ids_BT.to(device), attention_mask=mask, use_cache=False, **more).logits
    logits = logits if few else logits[:, columns_N.to(device)]
    if not logits[mask_BT[:, columns_N].to(device)].isfinite().all():
        raise GateError(f"row {name!r}: logits are not finite; look for NaN or inf in the model's weights")
    return logits.argmax(-1).cpu()
