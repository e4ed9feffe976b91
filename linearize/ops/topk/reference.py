"""Softmax over chosen keys, from its definition, quadratic."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._softmax import weigh


def weights_over(q_BHTK: Tensor, k_BHSK: Tensor, scale: float, seen_BHTS: Tensor) -> Tensor:
    """Softmax weights [B, H, T, S] over the keys that each query sees; 0 where it sees none."""
    weights, filled, *_ = weigh((q_BHTK @ k_BHSK.mT * scale).masked_fill(~seen_BHTS, -torch.inf))
    return weights / filled[..., None]


def seen_in_blocks(
    kept_BHIJ: Tensor, block: int, tokens: int, causal: bool, valid_BT: Tensor | None, rows: slice = slice(None)
) -> Tensor:
    """bool [B, H, rows, T]: the keys of the kept blocks that a query may see."""
    block_T = torch.arange(tokens, device=kept_BHIJ.device) // block
    seen = kept_BHIJ[:, :, block_T[rows]][..., block_T]
    if causal:
        column_T = torch.arange(tokens, device=kept_BHIJ.device)
        seen = seen & (column_T[rows, None] >= column_T)
    return seen if valid_BT is None else seen & valid_BT[:, None, None]


def blocks_reference(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    kept_BHIJ: Tensor,
    block: int,
    scale: float,
    causal: bool,
    valid_BT: Tensor | None,
) -> Tensor:
    """o_BHTV of softmax over the keys in kept blocks."""
    group = q_BHTK.shape[1] // k_BGTK.shape[1]
    k, v = k_BGTK.repeat_interleave(group, 1), v_BGTV.repeat_interleave(group, 1)
    seen = seen_in_blocks(kept_BHIJ, block, q_BHTK.shape[2], causal, valid_BT)
    return weights_over(q_BHTK, k, scale, seen) @ v
