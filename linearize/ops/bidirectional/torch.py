"""Bidirectional linear attention, plain torch: O(T), any device, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.linear import linear
from linearize.ops.local2d.torch import Tiles
from linearize.types import InputError


def bidirectional_torch(
    q_BHTF: Tensor, k_BJTF: Tensor, v_BGTV: Tensor, gap: int, circle: Any, segments_BT: Tensor | None
) -> Tensor:
    """Same as bidirectional_reference. Two matrix products where everybody reads everybody; else one causal scan from
    each side, or sums of whole tiles, so that a far sum is never a difference of two larger ones."""
    if circle is not None:
        if gap or segments_BT is not None:
            raise InputError("bidirectional: a circle of patches goes with neither a gap nor documents")
        return _outside(q_BHTF, k_BJTF, v_BGTV, *circle)
    if gap == 0 and segments_BT is None:
        return read(q_BHTF, key_sums(k_BJTF, v_BGTV))
    left = _scan(q_BHTF, k_BJTF, v_BGTV, gap, segments_BT)
    backward = None if segments_BT is None else -segments_BT.flip(1)  # numbers that never decrease
    flipped = [x.flip(2) for x in (q_BHTF, k_BJTF, v_BGTV)]
    return left + _scan(*flipped, max(gap, 1), backward).flip(2)  # the token itself is counted once, from the left


def key_sums(k_BJTF: Tensor, v_BGTV: Tensor) -> Tensor:
    """The sum of k_s [v_s, 1]^T over all s: [B, J, F, V + 1]."""
    v_BGTV1 = torch.cat([v_BGTV, torch.ones_like(v_BGTV[..., :1])], -1)
    return k_BJTF.mT @ v_BGTV1.repeat_interleave(k_BJTF.shape[1] // v_BGTV.shape[1], 1)


def read(q_BHTF: Tensor, sums_BJFV: Tensor) -> Tensor:
    """q_t S, [B, H, T, V + 1]."""
    return (q_BHTF.unflatten(1, (sums_BJFV.shape[1], -1)) @ sums_BJFV[:, :, None]).flatten(1, 2)


def late(k_BJTF: Tensor, v_BGTV: Tensor, gap: int, segments_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values that arrive `gap` columns late; a key that outlives its document is nobody's."""
    if not gap:
        return k_BJTF, v_BGTV
    T = k_BJTF.shape[2]
    k, v = (F.pad(x, (0, 0, gap, 0))[:, :, :T] for x in (k_BJTF, v_BGTV))
    if segments_BT is not None:
        late_BT = segments_BT[:, :-gap] == segments_BT[:, gap:]
        k = k * F.pad(late_BT, (min(gap, T), 0))[:, None, :, None]
    return k, v


def _scan(q: Tensor, k: Tensor, v: Tensor, gap: int, segments_BT: Tensor | None) -> Tensor:
    """The sum over s <= t - gap: causal attention over keys that arrive `gap` columns late."""
    out = linear(q, *late(k, v, gap, segments_BT), segments_BT=segments_BT)
    return torch.cat([out.numerator, out.normaliser[..., None]], -1)


def _outside(
    q_BHTF: Tensor, k_BJTF: Tensor, v_BGTV: Tensor, grid: tuple[int, int], radius: int, prefix: int, suffix: int
) -> Tensor:
    """Patches read those outside their circle: those of the tiles around theirs one by one, all others as sums over
    whole tiles. Tokens that are no patches have no far keys and are none."""
    H, T = q_BHTF.shape[1:3]
    patches = slice(prefix, T - suffix)
    q, k, v = (x[:, :, patches] for x in (q_BHTF, k_BJTF, v_BGTV))
    k, v = k.repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    side, around = tile(radius)
    tiles = Tiles(grid, around * side, q.device, side)
    far_QS = ~tiles.near(radius)
    sums = None
    if tiles.down * tiles.across > 1:
        pairs = zip(tiles.queries(k), tiles.queries(v), strict=True)
        sums = _elsewhere(torch.stack([x.mT @ y for x, y in pairs], 2), around)
    outs = []
    for i, (q_i, k_i, v_i) in enumerate(zip(tiles.queries(q), tiles.keys(k), tiles.keys(v), strict=True)):
        out = ((q_i @ k_i.mT) * far_QS) @ v_i
        outs.append(out if sums is None else out + q_i @ sums[:, :, i])
    return F.pad(tiles.together(outs), (0, 0, prefix, suffix))


def tile(radius: int) -> tuple[int, int]:
    """(side of a tile, how many tiles on each side of one its circles can touch)."""
    side = min(max(radius - 1, 4), 16)
    return side, -(-(radius - 1) // side)


def _elsewhere(sums_BHyxFV: Tensor, around: int) -> Tensor:
    """For each tile, the sum over all tiles more than `around` rows or columns of tiles away."""
    rows, columns = sums_BHyxFV.shape[2:4]
    whole = _beyond(sums_BHyxFV.sum(3), 2, around)[:, :, :, None]  # all of the rows above and below
    padded = F.pad(sums_BHyxFV, (0, 0, 0, 0, 0, 0, around, around))
    band = torch.stack([padded[:, :, i : i + rows] for i in range(2 * around + 1)]).sum(0)
    return whole + _beyond(band, 3, around) if columns > 1 else whole


def _beyond(x: Tensor, axis: int, around: int) -> Tensor:
    """At i, the sum of x at all places along `axis` more than `around` from i."""
    size = x.shape[axis]
    if size <= around + 1:
        return torch.zeros_like(x)
    away = around + 1
    none = torch.zeros_like(x.narrow(axis, 0, away))
    before = x.cumsum(axis).narrow(axis, 0, size - away)
    after = x.flip(axis).cumsum(axis).flip(axis).narrow(axis, away, size - away)
    return torch.cat([none, before], axis) + torch.cat([after, none], axis)
