"""Bidirectional linear attention from its definition, quadratic: what every other implementation is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.ops.local2d.reference import circle as circle_of


def bidirectional_reference(
    q_BHTF: Tensor, k_BJTF: Tensor, v_BGTV: Tensor, gap: int, circle: Any, segments_BT: Tensor | None
) -> Tensor:
    """o_t = sum over s of t's document with |t - s| >= gap, outside t's circle, of (q_t . k_s) [v_s, 1]: [B, H, T, V +
    1]."""
    H, T = q_BHTF.shape[1:3]
    k = k_BJTF.repeat_interleave(H // k_BJTF.shape[1], 1)
    v = v_BGTV.repeat_interleave(H // v_BGTV.shape[1], 1)
    column_T = torch.arange(T, device=q_BHTF.device)
    weights_BHTT = (q_BHTF @ k.mT) * ((column_T[:, None] - column_T).abs() >= gap)
    if circle is not None:
        weights_BHTT = weights_BHTT * ~circle_of(*circle, q_BHTF.device)
    if segments_BT is not None:
        weights_BHTT = weights_BHTT * (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    return weights_BHTT @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
