"""What encoders of text and of images share: features compared with the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from linearize.data.examples import Examples
from linearize.evaluate import features
from linearize.plan import Plan
from linearize.report import schema
from linearize.tasks.base import Exam, Pool, Teacher, Variant

Data = TypeVar("Data", bound=Examples)


class Compared(Exam, Generic[Data]):
    """Examples whose features, and classes where there are any, are compared with the teacher's."""

    followed = "share of the teacher's score, or cosine to its features"

    def __init__(self, data: Data, plan: Plan, pool: Pool, classify: bool, words: str = "") -> None:
        self.data, self.plan, self.pool, self.classify, self.words = data, plan, pool, classify, words

    @property
    def count(self) -> int:
        return len(self.data)

    @property
    def gold(self) -> Tensor | None:
        """The scores that people gave to pairs, where the exam has some."""
        return None

    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, *, progress: bool | None = None
    ) -> list[features.Score]:
        return features.compare(
            model, self.data, variants, teacher=teacher, pool=self.pool, classify=self.classify,
            batch=self.plan.eval.batch, progress=progress,
        )  # fmt: skip

    def rows(self, scores: Sequence[features.Score], seed: int) -> list[schema.Row]:
        found = []
        for row in features.table(scores, self.gold, seed=seed):
            values: dict[str, Any] = dict(row.metrics)
            found.append(schema.Row(name=row.name, documents=row.documents, intervals=row.intervals, **values))
        for name, span in self.plan.eval.parts.items():
            first, last = map(int, span.split("-"))
            some = [
                features.Score(s.name, {k: v[first : last + 1] for k, v in s.values.items() if len(v) == self.count})
                for s in scores
            ]
            for row, part in zip(found, features.table(some, resamples=0), strict=True):
                row.parts[name] = dict(part.metrics)
        return found

    def pack(self, score: features.Score) -> dict[str, Tensor]:
        return score.values

    def unpack(self, name: str, tensors: dict[str, Tensor]) -> features.Score:
        return features.Score(name, tensors)

    def follow(self, scores: Sequence[features.Score]) -> float:
        row = features.table([scores[0], scores[-1]], self.gold, resamples=0)[1]
        return row.metrics.get("retained", row.metrics.get("cosine", float("nan")))
