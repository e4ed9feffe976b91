"""Causal linear attention in chunks, plain torch: O(T), any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.linear.blocks import linear_blocks


def linear_torch(
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    v_BHTV: Tensor,
    state_BHFV1: Tensor | None,
    segments_BT: Tensor | None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same as linear_reference. Inside a chunk the masked product, between chunks the state: 2C(F+V) + 4F(V+1)
    operations per token and head against 2T(F+V)."""
    if torch.compiler.is_exporting():
        return linear_blocks(q_BHTF, k_BHTF, v_BHTV, state_BHFV1, segments_BT, chunk)  # a loop would fix the length
    B, H, T, F = k_BHTF.shape
    V = v_BHTV.shape[-1]
    state = state_BHFV1 if state_BHFV1 is not None else k_BHTF.new_zeros(B, H, F, V + 1)
    v_BHTV1 = torch.cat([v_BHTV, v_BHTV.new_ones(B, v_BHTV.shape[1], T, 1)], -1)
    if v_BHTV1.shape[1] != H:  # one value head serves a group of feature heads
        v_BHTV1 = v_BHTV1.repeat_interleave(H // v_BHTV1.shape[1], 1)
    if T == 1 and segments_BT is None:
        state = state + k_BHTF.mT * v_BHTV1
        return q_BHTF @ state, state
    outs = []
    last_B1 = None if segments_BT is None else segments_BT[:, :1]
    # Split, not sliced: the gradient of a slice is as long as the sequence, and of as many slices quadratic.
    pieces = zip(*(x.split(chunk, 2) for x in (q_BHTF, k_BHTF, v_BHTV1)), strict=True)
    for start, (q, k, v) in zip(range(0, T, chunk), pieces, strict=True):
        part = slice(start, start + q.shape[2])
        weights = (q @ k.mT).tril()
        if segments_BT is None:
            outs.append(weights @ v + q @ state)
            state = state + k.mT @ v
            continue
        seg_BC = segments_BT[:, part]
        carried_BC = (seg_BC == last_B1)[:, None, :, None]  # tokens that may read the state
        weights = weights * (seg_BC[:, :, None] == seg_BC[:, None, :])[:, None]
        outs.append(weights @ v + (q * carried_BC) @ state)
        now_B1 = seg_BC[:, -1:]
        state = state * (now_B1 == last_B1).view(B, 1, 1, 1) + (k * (seg_BC == now_B1)[:, None, :, None]).mT @ v
        last_B1 = now_B1
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0], state
