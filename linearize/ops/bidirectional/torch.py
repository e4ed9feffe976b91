"""Bidirectional linear attention, plain torch: O(T), any device, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops.linear import linear


def bidirectional_torch(q_BHTF: Tensor, k_BJTF: Tensor, v_BGTV: Tensor, gap: int, segments_BT: Tensor | None) -> Tensor:
    """Same as bidirectional_reference. Two matrix products where everybody reads everybody; else one causal scan from
    each side, so that a far sum is never a difference of two larger ones."""
    if gap == 0 and segments_BT is None:
        return _everybody(q_BHTF, k_BJTF, v_BGTV)
    left = _scan(q_BHTF, k_BJTF, v_BGTV, gap, segments_BT)
    backward = None if segments_BT is None else -segments_BT.flip(1)  # numbers that never decrease
    flipped = [x.flip(2) for x in (q_BHTF, k_BJTF, v_BGTV)]
    return left + _scan(*flipped, max(gap, 1), backward).flip(2)  # the token itself is counted once, from the left


def _everybody(q_BHTF: Tensor, k_BJTF: Tensor, v_BGTV: Tensor) -> Tensor:
    J = k_BJTF.shape[1]
    v_BGTV1 = torch.cat([v_BGTV, torch.ones_like(v_BGTV[..., :1])], -1)
    sums_BJFV1 = k_BJTF.mT @ v_BGTV1.repeat_interleave(J // v_BGTV.shape[1], 1)
    return (q_BHTF.unflatten(1, (J, -1)) @ sums_BJFV1[:, :, None]).flatten(1, 2)


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
