"""Bidirectional linear attention with its normaliser: `bidirectional`. Equations: Hedgehog (2402.04347) section 4 with
sums over all tokens; README.md here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, compute_dtype
from linearize.ops.bidirectional.reference import bidirectional_reference
from linearize.ops.bidirectional.torch import bidirectional_torch, tile


class Circle(NamedTuple):
    """The patches less than `radius` away, on a grid of (rows, columns) between `prefix` and `suffix` tokens, which are
    near everybody (see ops/local2d)."""

    grid: tuple[int, int]
    radius: int
    prefix: int = 0
    suffix: int = 0


class BidirectionalOutput(NamedTuple):
    """numerator_BHTV and normaliser_BHT: their ratio is the attention output."""

    numerator: Tensor
    normaliser: Tensor


IMPLEMENTATIONS = (
    Implementation("torch", bidirectional_torch),
    Implementation("reference", bidirectional_reference),
)


def bidirectional(
    q_BHTF: Tensor,
    k_BJTF: Tensor,
    v_BGTV: Tensor,
    *,
    gap: int = 0,
    circle: Circle | None = None,
    segments_BT: Tensor | None = None,
    impl: str = "auto",
) -> BidirectionalOutput:
    """Linear attention over features in both directions, un-normalised, on [v, 1]: token t reads all s, |t - s| >= gap.

    q_BHTF, k_BJTF: non-negative features; padding is a key of zeros. J key and G value heads, G dividing J dividing
    H. gap: the keys nearer than this are left to somebody else (0: none); circle: those in it are. segments_BT:
    document numbers, never decreasing along T; documents never read each other. Linear in T, computed in float32
    (float64 for float64 inputs). Raises InputError for an unknown or refusing `impl`.
    """
    dtype = compute_dtype(q_BHTF, k_BJTF, v_BGTV)
    q, k, v = q_BHTF.to(dtype), k_BJTF.to(dtype), v_BGTV.to(dtype)
    run = choose("bidirectional", IMPLEMENTATIONS, impl, q, k, v).run
    out_BHTV1 = run(q, k, v, gap, circle, segments_BT)
    return BidirectionalOutput(out_BHTV1[..., :-1], out_BHTV1[..., -1])


def one_by_one(radius: int) -> int:
    """How many keys around a patch are read one by one where a circle is left out: what costs are counted from."""
    side, around = tile(radius)
    return ((2 * around + 1) * side) ** 2
