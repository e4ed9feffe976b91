"""What teacher and student write: likelihood can rank students wrongly, their own text cannot hide.

Both continue the same prompts from their caches or states; the teacher then reads every continuation. A student that
lost its thread writes text that the teacher finds unlikely, or repeats itself (which greedy teachers find likely).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.data.selfgen import end_tokens, sample
from linearize.evaluate.quality import chosen, evaluating, forward
from linearize.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sample:
    """One prompt, continued by both."""

    prompt: str
    teacher: str
    student: str


@dataclass(frozen=True)
class Generation:
    """nll_*: the teacher's nats per token on its own and on the student's continuations. repetition_*: share of 4-grams
    that stood before in the same continuation. distinct_*: by n, the distinct n-grams of all continuations over all.
    """

    nll_teacher: float
    nll_student: float
    repetition_teacher: float
    repetition_student: float
    distinct_teacher: dict[int, float]
    distinct_student: dict[int, float]
    samples: list[Sample] = field(default_factory=list)

    def as_dict(self) -> dict[str, float]:
        """For `report.schema.Generation`."""
        names = ("nll_teacher", "nll_student", "repetition_teacher", "repetition_student")
        return {name: getattr(self, name) for name in names}


def prompts(documents: Sequence[Tensor], length: int, count: int) -> list[Tensor]:
    """The first `length` ids of the first `count` documents that are longer. Raises InputError where there are none."""
    found = [d[:length] for d in documents if len(d) > length][:count]
    if not found:
        raise InputError(f"no document is longer than a prompt of {length} tokens: give longer texts")
    return found


def generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[Tensor],
    *,
    new: int = 64,
    teacher: Callable[[], AbstractContextManager[Any]] = nullcontext,
    student: Callable[[], AbstractContextManager[Any]] = nullcontext,
    greedy: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int = 16,
    samples: int = 3,
) -> Generation:
    """Both continue each of `given` (int64 ids) by up to `new` tokens, to the end of text at most.

    Sampled with the same random numbers by default, so that they part only where their predictions do; greedy on
    request. samples: how many are returned as text. Repetition and distinct n-grams are of the continuations alone.
    """
    if not given or new < 4:
        raise InputError("generation needs at least one prompt and 4 new tokens")
    ends = end_tokens(model, tokenizer)
    written: dict[str, list[list[int]]] = {"teacher": [], "student": []}
    nats = {"teacher": 0.0, "student": 0.0}
    for at in range(0, len(given), batch):
        part = given[at : at + batch]
        width = max(map(len, part))
        pad = ends[0] if ends else 0
        ids = torch.stack([torch.nn.functional.pad(p.cpu(), (width - len(p), 0), value=pad) for p in part])
        real = torch.stack([torch.arange(width) >= width - len(p) for p in part])
        for name, enter in (("teacher", teacher), ("student", student)):
            with enter() as other:
                writer: Any = chosen(model, other)
                draw = None if greedy else seed + at
                out = sample(writer, ids, real.long(), new, seed=draw, temperature=temperature, top_p=top_p, ends=ends)
            rows = [_until(row, ends) for row in out[:, width:].tolist()]
            written[name] += rows
            with teacher() as other:
                nats[name] += _read(chosen(model, other), part, rows)
    count = {name: max(1, sum(map(len, rows))) for name, rows in written.items()}
    return Generation(
        nll_teacher=nats["teacher"] / count["teacher"],
        nll_student=nats["student"] / count["student"],
        repetition_teacher=repetition(written["teacher"]),
        repetition_student=repetition(written["student"]),
        distinct_teacher={n: distinct(written["teacher"], n) for n in (1, 2, 3)},
        distinct_student={n: distinct(written["student"], n) for n in (1, 2, 3)},
        samples=[
            Sample(*(tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt.tolist(), a, b)))
            for prompt, a, b in zip(given[:samples], written["teacher"], written["student"], strict=False)
        ],
    )


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Up to and with the first end of text."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]


def _read(model: Any, given: Sequence[Tensor], rows: Sequence[list[int]]) -> float:
    """Nats of the continuations, together, as the model reads them behind their prompts."""
    whole = [torch.cat([prompt.cpu(), torch.tensor(row, dtype=torch.long)]) for prompt, row in zip(given, rows)]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    sizes = torch.tensor([len(w) for w in whole])
    place = torch.arange(ids.shape[1])
    with evaluating(model):
        logits = forward(model, ids, place < sizes[:, None]).logits
    starts = torch.tensor([len(p) for p in given])
    written = (place >= starts[:, None]) & (place < sizes[:, None])
    chosen = logits[:, :-1][written[:, 1:].to(logits.device)].float().log_softmax(-1)
    return -float(chosen.gather(-1, ids[:, 1:][written[:, 1:], None].to(logits.device)).double().sum())


def repetition(rows: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams that stood before in the same row, over all rows (0 where none has n tokens)."""
    grams = [Counter(_grams(row, n)) for row in rows]
    total = sum(g.total() for g in grams)
    return sum(g.total() - len(g) for g in grams) / total if total else 0.0


def distinct(rows: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of all rows over their number (0 where none has n tokens)."""
    grams = Counter(gram for row in rows for gram in _grams(row, n))
    return len(grams) / grams.total() if grams else 0.0


def _grams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
