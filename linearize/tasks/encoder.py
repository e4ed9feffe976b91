"""What encoders of text and of images share: features, and classes where there are any, compared with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

from linearize.data.examples import Examples
from linearize.evaluate import encoders
from linearize.plan import Plan
from linearize.report import schema
from linearize.tasks.base import Exam, Pool, Teacher, Variant

Data = TypeVar("Data", bound=Examples)

#: what the rows of a report call a figure, where it is another name
_NAMES = {"top1": "accuracy", "token_cosine": "dense_cosine", "top1_ratio": "retained", "spearman_ratio": "retained"}


class Compared(Exam, Generic[Data]):
    """Examples on which every variant is compared with the teacher."""

    followed = "share of the teacher's score, or cosine to its features"

    def __init__(self, data: Data, plan: Plan, pool: Pool, words: str = "") -> None:
        self.data, self.plan, self.pool, self.words = data, plan, pool, words
        self.notes = data.notes

    @property
    def count(self) -> int:
        return len(self.data)

    @property
    def example(self) -> dict[str, Tensor]:
        return {name: x for name, x in self.data.collate([self.data[0]]).items() if name != "labels"}

    @property
    def wanted(self) -> Tensor | None:
        """The scores that people gave to pairs, where there are some."""
        return None

    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, *, progress: bool | None = None
    ) -> list[encoders.Score]:
        return encoders.measure(
            model, self.data, variants, teacher=teacher, pool=self.pool, batch=self.plan.eval.batch, progress=progress
        )

    def rows(self, scores: Sequence[encoders.Score], seed: int) -> list[schema.Row]:
        found = [_row(row) for row in encoders.table(scores, seed=seed)]
        for name, span in self.plan.eval.parts.items():
            first, last = map(int, span.split("-"))
            some = [_part(score, slice(first, last + 1)) for score in scores]
            for row, part in zip(found, encoders.table(some, resamples=0), strict=True):
                row.parts[name] = {_NAMES.get(key, key): value for key, value in part.figures.items()}
        return found

    def pack(self, score: encoders.Score) -> dict[str, Tensor]:
        return {name: sample.values_N for name, sample in score.samples.items()}

    def unpack(self, name: str, tensors: dict[str, Tensor]) -> encoders.Score:
        wanted = {"spearman": self.wanted}
        return encoders.Score(name, {key: encoders.Sample(v, wanted.get(key)) for key, v in tensors.items()})

    def follow(self, scores: Sequence[encoders.Score]) -> float:
        figures = _row(encoders.table([scores[0], scores[-1]], resamples=0)[1])
        value = figures.cosine if figures.retained is None else figures.retained
        return float("nan") if value is None else value


def _row(row: encoders.Row) -> schema.Row:
    """Of several shares the first stays: that of the classes, else of the pairs."""
    known = schema.Row.METRICS
    figures: dict[str, float] = {}
    intervals: dict[str, tuple[float | None, float | None]] = {}
    for key, value in row.figures.items():
        name = _NAMES.get(key, key)
        if name in known and name not in figures:
            figures[name] = value
            if key in row.intervals:
                intervals[name] = row.intervals[key]
    if row.name == "teacher":
        figures.pop("retained", None)
        intervals.pop("retained", None)
    values: dict[str, float | None] = dict(figures)
    return schema.Row(name=row.name, documents=row.examples.get("cosine"), intervals=intervals, **values)  # type: ignore[arg-type]


def _part(score: encoders.Score, rows: slice) -> encoders.Score:
    """The samples with one number per example (not those of pairs)."""
    own = {k: encoders.Sample(s.values_N[rows]) for k, s in score.samples.items() if s.wanted_N is None}
    return encoders.Score(score.name, own)
