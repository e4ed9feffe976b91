"""Bidirectional linear attention with its normaliser: `bidirectional`. Equations: Hedgehog (2402.04347) section 4 with
sums over all tokens; README.md here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch import cat as torch_cat
from torch.compiler import is_compiling

from linearize.ops._dispatch import Implementation, choose, compute_dtype
from linearize.ops.bidirectional.reference import bidirectional_reference
from linearize.ops.bidirectional.torch import bidirectional_torch, key_sums, read, tile


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


def in_pieces(
    phi_q: Callable[[slice], Tensor], phi_k: Callable[[slice], Tensor], v_BGTV: Tensor, piece: int = 1024
) -> BidirectionalOutput:
    """`bidirectional` where everybody reads everybody, with features made piece by piece: phi_q(columns) and
    phi_k(columns) are those of some tokens, as above. Pieces that fit the cache are faster on a CPU than whole tensors
    of features, and no such tensor is held where no gradient is wanted."""
    T = v_BGTV.shape[2]
    whole = piece >= T or is_compiling()
    columns = [slice(0, T)] if whole else [slice(i, min(i + piece, T)) for i in range(0, T, piece)]
    sums = None
    for part in columns:
        k, v = phi_k(part), v_BGTV[:, :, part]
        dtype = compute_dtype(k, v)
        more = key_sums(k.to(dtype), v.to(dtype))
        sums = more if sums is None else sums + more
    outs = []
    for part in columns:
        q = phi_q(part)
        out = read(q.to(compute_dtype(q, v_BGTV)), sums)
        outs.append((out[..., :-1], out[..., -1]))
    if whole:
        return BidirectionalOutput(*outs[0])
    return BidirectionalOutput(*(torch_cat(list(x), 2) for x in zip(*outs, strict=True)))


def one_by_one(radius: int) -> int:
    """How many keys around a patch are read one by one where a circle is left out: what costs are counted from."""
    side, around = tile(radius)
    return ((2 * around + 1) * side) ** 2
