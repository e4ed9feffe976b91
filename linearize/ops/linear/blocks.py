"""Causal linear attention, all chunks at once: no Python loop, so that a length may stay symbolic (torch.export)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_blocks(
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    v_BHTV: Tensor,
    state_BHFV1: Tensor | None,
    segments_BT: Tensor | None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same as linear_reference; holds one state per chunk."""
    H, T = k_BHTF.shape[1:3]
    v_BHTV1 = torch.cat([v_BHTV, torch.ones_like(v_BHTV[..., :1])], -1)
    if v_BHTV1.shape[1] != H:  # one value head serves a group of feature heads
        v_BHTV1 = v_BHTV1.repeat_interleave(H // v_BHTV1.shape[1], 1)
    blocks = T // chunk + 1  # always some padding: a length that fills its chunks is no special case then
    missing = blocks * chunk - T
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(2, (blocks, chunk)) for x in (q_BHTF, k_BHTF, v_BHTV1))
    weights = (q @ k.mT).tril()
    empty = torch.zeros_like(k[:, :, 0, 0, :, None] * v[:, :, 0, 0, None, :])
    state = empty if state_BHFV1 is None else state_BHFV1
    if segments_BT is None:
        sums = k.mT @ v  # B H blocks F V+1
        after = state[:, :, None] + sums.cumsum(2)
    else:
        first_B1 = segments_BT[:, :1]
        segments = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, missing)], 1).unflatten(1, (blocks, chunk))
        end_BN = segments[:, :, -1]
        carried_BN = torch.cat([first_B1, end_BN], 1)[:, :-1]  # the document a chunk's incoming state belongs to
        weights = weights * (segments[..., :, None] == segments[..., None, :])[:, None]
        q = q * (segments == carried_BN[..., None])[:, None, ..., None]
        sums = (k * (segments == end_BN[..., None])[:, None, ..., None]).mT @ v
        order = torch.arange(blocks, device=k.device)
        same_BNM = (end_BN[:, :, None] == end_BN[:, None, :]) & (order <= order[:, None])
        after = torch.einsum("bnm,bhmfv->bhnfv", same_BNM.to(sums.dtype), sums)
        after = after + state[:, :, None] * (end_BN == first_B1)[:, None, :, None, None]
    before = torch.cat([state[:, :, None], after], 2)[:, :, :-1]
    out = weights @ v + q @ before
    return out.flatten(2, 3)[:, :, :T], after[:, :, -1]
