"""The interface between the road of a conversion, which is one for all models, and what a model is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from linearize.data.examples import Examples
from linearize.data.noise import Noising
from linearize.evaluate import diagnostics
from linearize.evaluate.quality import WINDOW
from linearize.plan import Plan
from linearize.report import looks, schema
from linearize.surgery import files
from linearize.surgery.attach import Surgery
from linearize.types import InputError

Variant = tuple[str, Callable[[], AbstractContextManager[Any]]]
Teacher = Callable[[], AbstractContextManager[Any]]
Pool = Callable[[Tensor, Tensor], Tensor]
Say = Callable[[str], None]

#: the held-out examples that a table was measured on, in the output folder
HELD_OUT = "held_out.safetensors"


def called(source: Any, otherwise: str) -> str:
    """A source of data in words, without the folders of this machine. otherwise: where none is named."""
    if source is None:
        return otherwise
    return Path(source).name if Path(source).exists() else str(source)


class Exam(ABC):
    """What a table is measured on, the same for all of its rows. count: of `unit`; words: all that in words.

    A score is of one row, with one entry per prediction or example, so that a row can be made of it (`rows`) and it
    can be kept (`pack`, `unpack`). followed: what `follow` says, in words. notes: what a user may not have expected.
    """

    unit: ClassVar[str]
    followed: ClassVar[str]
    words: str
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def count(self) -> int: ...

    @property
    @abstractmethod
    def example(self) -> dict[str, Tensor]:
        """The first of them, as a batch of its own; a long one cut: what attention is looked at on."""

    @abstractmethod
    def measure(
        self, model: nn.Module, variants: Sequence[Variant], teacher: Teacher, *, progress: bool | None = None
    ) -> list[Any]:
        """Scores of the teacher, first, and of each variant."""

    @abstractmethod
    def rows(self, scores: Sequence[Any], seed: int) -> list[schema.Row]:
        """The table, the teacher's score first; parts that the plan names stand in each row."""

    @abstractmethod
    def pack(self, score: Any) -> dict[str, Tensor]: ...

    @abstractmethod
    def unpack(self, name: str, tensors: dict[str, Tensor]) -> Any: ...

    @abstractmethod
    def few(self, most: int) -> Exam:
        """At most so many of the examples: what a curve is followed on."""

    @abstractmethod
    def follow(self, scores: Sequence[Any]) -> float:
        """One figure for the last of the scores, the teacher's being the first."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Keep the examples in `folder` (HELD_OUT), for `Task.kept` to read."""


class Task(ABC):
    """What a model is for. name: as recipes write it; zero: rivals of the student that take no training, (row, method,
    settings); folder: where the model came from, where that is known."""

    name: ClassVar[str]

    def __init__(self, plan: Plan, model: nn.Module, processor: Any, folder: Path | None = None) -> None:
        """processor: tokenizer, image processor, or a scheduler of noise."""
        self.plan, self.model, self.processor, self.folder = plan, model, processor, folder

    @abstractmethod
    def read(self, given: Any, work: Path | None, say: Say) -> Examples:
        """What is trained on: `given` (data in hand) or what the plan names; work: a folder to keep things in. Raises
        InputError where the model cannot take it."""

    @abstractmethod
    def exam(self, valid: Examples | None) -> Exam:
        """On held-out examples, or (None) on what the plan names."""

    @abstractmethod
    def kept(self, folder: Path) -> Exam | None:
        """On what an exam wrote into `folder`; None where nothing is there."""

    @property
    def held_out(self) -> bool:
        """Whether the table is measured on a held-out part of the training data."""
        return not (self.plan.eval.source or self.plan.data.valid)

    @property
    def noising(self) -> Noising | None:
        """How noise gets into the data, of diffusion models."""
        return None

    @property
    def pool(self) -> Pool | None:
        """The feature of each example, [B, E], from (last hidden state [B, T, D], real_BT), of encoders."""
        return None

    @property
    def zero(self) -> list[tuple[str, str, dict[str, Any]]]:
        plan = self.plan.eval
        return [(WINDOW, "window", {"window": plan.window, "sinks": plan.sinks})]

    @abstractmethod
    def samples(
        self, surgery: Surgery, exam: Exam, teacher: Teacher
    ) -> tuple[list[schema.Sample], schema.Generation | None]:
        """What both say of the same examples."""

    @abstractmethod
    def diagnostics(self, surgery: Surgery, exam: Exam) -> looks.Diagnostics:
        """What their attention looks like."""

    def write(self, surgery: Surgery, folder: Path, revision: str | None) -> None:
        """The converted model into `folder`, as the plan's output says; LoRA is merged already where it is to be.
        revision: the commit that its base was loaded from, where the hub gave one."""
        plan = self.plan
        if plan.output.adapter_only:
            files.write_adapter(surgery, folder, base=plan.model.id, revision=revision, task=plan.task)
            return
        files.write(surgery, folder, self.processor)
        files.carry(self.folder, folder, self.carried)

    @property
    def carried(self) -> list[str]:
        """Files and folders of the model's own folder that neither it nor its processor writes."""
        return []


def diagnosed(
    surgery: Surgery,
    batches: list[dict[str, Tensor]],
    shown: dict[str, Tensor] | None = None,
    labels: list[str] | None = None,
) -> looks.Diagnostics:
    """Head by head on batches of one example each, and pictures of the weights on `shown`; labels: of its tokens."""
    try:
        found = diagnostics.diagnose(surgery, batches)
    except InputError:  # no mixer with weights: there is nothing to compare
        return looks.Diagnostics()
    return looks.Diagnostics(
        layers=found.layers,
        entropy=looks.Pair(**found.entropy),
        monotonicity=looks.Pair(**found.monotonicity),
        pictures=[
            looks.Picture.pack(layer, head, maps["teacher"], maps["student"], labels)
            for (layer, head), maps in (diagnostics.dense_maps(surgery, shown) if shown else {}).items()
        ],
    )
