"""What a stage trains on, whatever it is made of: text, sentences, images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from typing import Self

    from transformers import PretrainedConfig

    from linearize.types import StageReport


class Examples(Dataset, ABC):
    """Examples of one kind, map-style and seekable: item i is the model's inputs for one example, without a batch axis.

    "labels" is among them only where known. `take` and `hold_out` give views, not copies. notes: what a user may not
    have expected. made: what it cost the teacher to make them, where it did.
    """

    notes: tuple[str, ...] = ()
    made: StageReport | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Positions that the model sees in all examples together; an image counts its patches and its prefix."""

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions of the longest example."""

    @property
    def sizes(self) -> Tensor | None:
        """int64 [N]: positions of each example; None where all are alike."""
        return None

    @property
    def mean(self) -> float:
        """Positions of an example, on average: what stages count tokens by."""
        return self.tokens / len(self)

    @property
    @abstractmethod
    def digest(self) -> str:
        """sha256 over content and settings: equal digests mean equal data."""

    @abstractmethod
    def take(self, start: int, stop: int | None = None) -> Self:
        """Examples start..stop. Raises InputError where there are none."""

    @abstractmethod
    def hold_out(self, tokens: int) -> tuple[Self, Self]:
        """(training, validation): the last examples, `tokens` positions or a little more of them, apart from the rest.

        Raises InputError where nothing would be left to train on.
        """

    @abstractmethod
    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch of the model's inputs, padded on the right where items differ in length, with an `attention_mask`."""

    @abstractmethod
    def check(self, config: PretrainedConfig, *, allow_longer: bool = False) -> None:
        """Raises InputError where the model of `config` cannot take these examples."""
