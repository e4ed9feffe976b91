"""What a report keeps of attention: figures head by head, weights as pictures, where a patch looks."""

from __future__ import annotations

import base64
import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict

from linearize.types import InputError

DIGITS = 6


def number(value: Any) -> Any:
    """null for what is not finite, six significant digits otherwise; what is no number is left to pydantic."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


#: A number as measured, or None where it was not.
Number = Annotated[float | None, BeforeValidator(number)]


class Strict(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Pair(Strict):
    """One number per layer (axis 0) and head (axis 1), before and after."""

    teacher: list[list[Number]]
    student: list[list[Number]]


class Picture(Strict):
    """Attention weights [T, T] of one head, as bytes: 255 * sqrt(weight), base64. tokens: labels, if wanted."""

    layer: int
    head: int
    size: int
    teacher: str
    student: str
    tokens: list[str] | None = None

    @classmethod
    def pack(cls, layer: int, head: int, teacher: Any, student: Any, tokens: list[str] | None = None) -> Picture:
        """From two [T, T] arrays or CPU tensors. Negative weights (a mixer may have them) are shown as 0."""
        size = len(teacher)

        def pack(weights: Any) -> str:
            clipped = np.clip(np.nan_to_num(np.asarray(weights, dtype=np.float64)), 0, 1)
            return base64.b64encode(np.rint(255 * np.sqrt(clipped)).astype(np.uint8).tobytes()).decode()

        return cls(layer=layer, head=head, size=size, teacher=pack(teacher), student=pack(student), tokens=tokens)

    def unpack(self, which: Literal["teacher", "student"]) -> np.ndarray:
        """The weights [T, T], to within 1/255 of their root. Raises InputError where the bytes do not fit `size`."""
        raw = base64.b64decode(getattr(self, which))
        if len(raw) != self.size**2:
            raise InputError(f"attention picture of layer {self.layer}: {len(raw)} bytes for size {self.size}")
        return (np.frombuffer(raw, np.uint8).reshape(self.size, self.size) / 255.0) ** 2


class Gaze(Strict):
    """Where one token of an image looks in one head: weights over the grid (rows, columns) of patches, as bytes:
    255 * sqrt(weight / top), base64. patch: the token's number among the patches, None for the first token before them.
    """

    layer: int
    head: int
    grid: tuple[int, int]
    patch: int | None
    top: Number
    teacher: str
    student: str

    @classmethod
    def pack(cls, layer: int, head: int, grid: tuple[int, int], patch: int | None, teacher: Any, student: Any) -> Gaze:
        """From two rows of weights over the patches, arrays or CPU tensors. Negative weights are shown as 0."""
        both = {"teacher": np.asarray(teacher, np.float64), "student": np.asarray(student, np.float64)}
        both = {key: np.nan_to_num(weights).clip(0) for key, weights in both.items()}
        top = max(float(weights.max()) for weights in both.values()) or 1.0
        raw = {key: np.rint(255 * np.sqrt(weights / top)).astype(np.uint8) for key, weights in both.items()}
        coded = {key: base64.b64encode(values.tobytes()).decode() for key, values in raw.items()}
        return cls(layer=layer, head=head, grid=grid, patch=patch, top=top, **coded)

    def unpack(self, which: Literal["teacher", "student"]) -> np.ndarray:
        """sqrt(weight / top) [rows, columns]. Raises InputError where the bytes do not fit the grid."""
        raw = base64.b64decode(getattr(self, which))
        if len(raw) != self.grid[0] * self.grid[1]:
            raise InputError(f"attention of layer {self.layer}: {len(raw)} bytes for a grid of {self.grid}")
        return np.frombuffer(raw, np.uint8).reshape(self.grid) / 255.0


class Diagnostics(Strict):
    """layers: the layer number of each row of the pairs. entropy: nats. monotonicity: Spearman, -1..1. image: what the
    gazes look at, PNG in base64. grid: drawings side by side, PNG in base64, a row for each of `grid_rows`."""

    layers: list[int] = []
    entropy: Pair | None = None
    monotonicity: Pair | None = None
    pictures: list[Picture] = []
    gazes: list[Gaze] = []
    image: str | None = None
    grid: str | None = None
    grid_rows: list[str] = []
