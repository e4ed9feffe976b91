"""Causal linear attention from its definition, quadratic: what every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_reference(
    q_BHTF: Tensor, k_BHTF: Tensor, v_BHTV: Tensor, state_BHFV1: Tensor | None, segments_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o_t = sum_{s <= t, same segment} (q_t . k_s) [v_s, 1] (+ q_t . S_0), and S_T; in the inputs' dtype."""
    B, H, T, F = k_BHTF.shape
    v_BHTV1 = torch.cat([v_BHTV, v_BHTV.new_ones(B, v_BHTV.shape[1], T, 1)], -1).expand(B, H, T, -1)
    weights_BHTT = (q_BHTF @ k_BHTF.mT).tril()
    if segments_BT is not None:
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        weights_BHTT = weights_BHTT * same_BTT[:, None]
    out = weights_BHTT @ v_BHTV1
    keys = k_BHTF
    first = q_BHTF.new_ones(B, T, dtype=torch.bool)
    if segments_BT is not None:
        keys = k_BHTF * (segments_BT == segments_BT[:, -1:])[:, None, :, None]
        first = segments_BT == segments_BT[:, :1]
    state = keys.mT @ v_BHTV1
    if state_BHFV1 is not None:
        out = out + (q_BHTF * first[:, None, :, None]) @ state_BHFV1
        state = state + state_BHFV1 * first[:, -1].view(B, 1, 1, 1)
    return out, state
