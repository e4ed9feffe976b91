"""Softmax over a window, by blocks of queries: O(T x width), plain torch, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops._softmax import weigh


def window_torch(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    width: int,
    ahead: int,
    scale: float,
    codes_BT: Tensor,
    codes_BS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same as window_reference. A block of C queries reads the C + width - 1 + ahead keys around it."""
    B, H, T, K = q_BHTK.shape
    S = k_BHSK.shape[2]
    block = min(T, max(32, width))
    # While exporting always some padding: a length that fills its blocks is no special case then.
    blocks = T // block + 1 if torch.compiler.is_exporting() else -(-T // block)
    reach = block + width - 1 + ahead
    # Keys laid out so that block i starts at column i * block: `width - 1` before the first query, `ahead` after the
    # last, and a ragged end.
    before = width - 1 - (S - T)
    after = blocks * block - T
    around = (before, after + ahead)
    k = F.pad(k_BHSK, (0, 0, *around)) if any(around) else k_BHSK
    v = F.pad(v_BHSV, (0, 0, *around)) if any(around) else v_BHSV
    codes_S = F.pad(codes_BS, around) if any(around) else codes_BS
    q = F.pad(q_BHTK, (0, 0, 0, after)) if after else q_BHTK
    codes_T = F.pad(codes_BT, (0, after)) if after else codes_BT
    q = q.view(B, H, blocks, block, K)
    k = k.unfold(2, reach, block)  # B H blocks K reach
    v = v.unfold(2, reach, block).mT
    codes_k = codes_S.unfold(1, reach, block)  # B blocks reach
    distance = torch.arange(block, device=q.device)[:, None] + (width - 1) - torch.arange(reach, device=q.device)
    seen = (distance >= -ahead) & (distance < width)
    same = (codes_T.view(B, blocks, block, 1) == codes_k[:, :, None]) & (codes_k > 0)[:, :, None]
    scores = (q @ k * scale).masked_fill(~(seen & same)[:, None], -torch.inf)
    weights, filled, lse, top = weigh(scores)
    out = (weights @ v) / filled[..., None]

    def rows(x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, :T]

    return rows(out), rows(lse), rows(top)
