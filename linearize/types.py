"""Values that every part of the house shares.

Shape letters, used in names everywhere (`q_BHTK`):

    B batch      T tokens of this call (queries)   S tokens seen as keys
    H query heads     G key/value heads     K key dim     V value dim
    D model width     F features of a map   W window      N sinks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

#: A recurrent state: tensors with the batch as axis 0; float32 except for keys and values kept as they came.
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class SiteShape:
    """Sizes of one attention layer, read from its configuration (no forward pass).

    `window` is the teacher's own sliding window or chunk (None: it sees everything). image: the tokens are patches of
    an image, so that their order along T is no distance. joint: text and an image in one sequence.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    width: int
    scale: float
    causal: bool = True
    window: int | None = None
    image: bool = False
    joint: bool = False

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def kv_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the teacher's own cache for one sequence of `tokens` (bf16 by default)."""
        kept = tokens if self.window is None else min(tokens, self.window)
        return self.kv_heads * (self.key_dim + self.value_dim) * kept * itemsize


@dataclass(frozen=True)
class Site:
    """One place where softmax attention can be replaced.

    name: dotted path of the attention module in the model. layer: its index in the cache (None: uncached).
    seam: how it is reached, "interface" or "sdpa". drops: what softmax did there that a mixer cannot keep, in words.
    cache_dims: per-token elements of the teacher's real cache where that is smaller than K and V (MLA), else None.
    heads: the key/value groups to convert (None: all; a subset is a head-level hybrid). owner: the diffusion
    transformer around it, which knows the grid (None: another kind of model).
    """

    name: str
    layer: int | None
    shape: SiteShape
    seam: Literal["interface", "sdpa"] = "interface"
    drops: tuple[str, ...] = ()
    cache_dims: int | None = None
    heads: tuple[int, ...] | None = None
    owner: str | None = None

    def kv_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes the teacher's cache needs at this site for one sequence of `tokens`."""
        if self.cache_dims is None:
            return self.shape.kv_bytes(tokens, itemsize)
        return self.cache_dims * tokens * itemsize


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of this call, and its inverse.

    cos, sin [B, T, R] as the family's own function `apply` takes them; it rotates the first `channels` of each head
    (R of them, or 2 R in families that keep one half of cos and sin).
    """

    cos: Tensor
    sin: Tensor
    apply: Callable[..., Any]
    channels: int

    def undo(self, x_BHTK: Tensor) -> Tensor:
        """x before rotation."""
        return self.undo_both(x_BHTK, x_BHTK)[0]

    def undo_both(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """q and k before rotation: the family's function with (cos, -sin), over cos^2 + sin^2 (YaRN scales both)."""
        size = (self.cos.float() ** 2 + self.sin.float() ** 2)[..., :1]
        cos, sin = ((x / size).to(q_BHTK.dtype) for x in (self.cos, -self.sin))
        back = self.apply(q_BHTK[..., : self.channels], k_BGTK[..., : self.channels], cos, sin)
        whole = [
            torch.cat([head, x[..., self.channels :]], -1) if x.shape[-1] > self.channels else head
            for head, x in zip(back, (q_BHTK, k_BGTK), strict=True)
        ]
        return whole[0].to(q_BHTK.dtype), whole[1].to(k_BGTK.dtype)


@dataclass
class Slot:
    """Where one layer's state lives while decoding: the seam's cache layer hands it over."""

    state: State | None = None


@dataclass(frozen=True)
class Context:
    """All of one attention call that is not q, k, v.

    valid_BT is True at real tokens of this call (None: all real). segments_BT numbers packed documents, never
    decreasing along T (None: one document per row). hidden_BTD only where the mixer asks for it. slot is this
    layer's state while decoding (None: no cache). teacher() runs the family's own attention on this call's inputs.
    """

    causal: bool
    scale: float
    valid_BT: Tensor | None = None
    segments_BT: Tensor | None = None
    positions_BT: Tensor | None = None
    rotary: Rotary | None = None
    hidden_BTD: Tensor | None = None
    mask: Tensor | None = None
    grid: tuple[int, ...] | None = None
    prefix: int = 0
    suffix: int = 0
    slot: Slot | None = None
    teacher: Callable[[], Tensor] | None = None

    def codes(self, like_BHTK: Tensor) -> Tensor:
        """Segment number (from 1) at real tokens, 0 at padding: int64 [B, T]."""
        B, _, T, _ = like_BHTK.shape
        if self.segments_BT is not None:
            codes = self.segments_BT - self.segments_BT[:, :1] + 1
        else:
            codes = torch.ones(B, T, dtype=torch.long, device=like_BHTK.device)
        return codes if self.valid_BT is None else codes * self.valid_BT

    def visible(self, like_BHTK: Tensor, rows: slice = slice(None), window: int | None = None) -> Tensor:
        """Which keys of this call the queries `rows` may see, from the definition: bool [B, rows, T]. window: only
        those less than so many columns away."""
        codes_BT = self.codes(like_BHTK)
        column_T = torch.arange(codes_BT.shape[1], device=codes_BT.device)
        distance_RT = column_T[rows, None] - column_T
        seen_BRT = (codes_BT[:, rows, None] == codes_BT[:, None]) & (codes_BT > 0)[:, None]
        if self.causal:
            seen_BRT = seen_BRT & (distance_RT >= 0)
        return seen_BRT if window is None else seen_BRT & (distance_RT.abs() < window)

    def take(self, columns: slice, rows: slice | Tensor = slice(None)) -> Context:
        """The context of these tokens (and rows of the batch) alone; mask, grid and slot are the whole call's."""

        def cut(x: Tensor | None) -> Any:
            return None if x is None else x[rows, columns]

        turned = self.rotary
        if turned is not None:
            turned = replace(
                turned, **{n: x[columns] if (x := getattr(turned, n)).ndim == 2 else cut(x) for n in ("cos", "sin")}
            )
        names = ("valid_BT", "segments_BT", "positions_BT", "hidden_BTD")
        return replace(self, rotary=turned, **{name: cut(getattr(self, name)) for name in names})

    def without_slot(self) -> Context:
        return replace(self, slot=None)


@dataclass(frozen=True)
class StateSpec:
    """One tensor of a state. shape has -1 for the batch, and where it grows with the tokens; head_axis is None where no
    axis is a head."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    head_axis: int | None

    def nbytes(self, batch: int = 1) -> int:
        size = math.prod(batch if n == -1 else n for n in self.shape)
        return size * self.dtype.itemsize


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved, one sequence, one layer, forward."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass
class StageReport:
    """What a stage did. `series` maps a name to one number per logged step."""

    name: str
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first: float = math.nan
    last: float = math.nan
    series: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class LinearizeError(Exception):
    """An error a user can mend. `code` is the exit code of the command line (see cli.py)."""

    code = 1


class InputError(LinearizeError):
    """Bad input, recipe or data."""

    code = 2


class Unsupported(LinearizeError):
    """This model or method cannot be converted, with the reason."""

    code = 3


class GateError(LinearizeError):
    """Numerics went wrong, or a quality gate of the recipe was missed (then `answer` is the finished conversion)."""

    code = 4
    answer: Any = None


class StorageError(LinearizeError):
    """Reading or writing failed."""

    code = 5


def nearest(word: str, names: Sequence[str]) -> str:
    """The sentence "did you mean ...?" for an unknown name, or the list of valid ones."""
    import difflib

    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(sorted(names))}"
