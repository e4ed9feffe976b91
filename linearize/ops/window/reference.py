"""Softmax over a window, from its definition, quadratic."""

from __future__ import annotations

import torch
from torch import Tensor


def window_reference(
    q_BHTK: Tensor,
    k_BHSK: Tensor,
    v_BHSV: Tensor,
    width: int,
    ahead: int,
    scale: float,
    codes_BT: Tensor,
    codes_BS: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output_BHTV, lse_BHT, max_BHT) of softmax over the keys at distance -ahead .. width-1 with the query's own
    code.

    Query t stands at key column t + S - T. Code 0 is a key nobody sees. Where nothing is visible: 0, -inf, -inf.
    """
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    column_T = torch.arange(T, device=q_BHTK.device) + (S - T)
    distance_TS = column_T[:, None] - torch.arange(S, device=q_BHTK.device)
    seen = (distance_TS >= -ahead) & (distance_TS < width)
    seen_BTS = seen & (codes_BT[:, :, None] == codes_BS[:, None, :]) & (codes_BS[:, None, :] > 0)
    return softmax_over(q_BHTK, k_BHSK, v_BHSV, scale, seen_BTS)


def softmax_over(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float, seen_BTS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(output_BHTV, lse_BHT, max_BHT) of softmax over the keys that are seen. Where none is: 0, -inf, -inf."""
    hidden_BTS, empty_BT = ~seen_BTS[:, None], ~seen_BTS.any(-1)[:, None]
    scores = q_BHTK @ k_BHSK.mT * scale
    weights = scores.masked_fill(hidden_BTS, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden_BTS, 0)
    lse = scores.masked_fill(hidden_BTS & ~empty_BT[..., None], -torch.inf).logsumexp(-1)
    top = scores.masked_fill(hidden_BTS, -torch.inf).amax(-1)
    return weights @ v_BHSV, lse.masked_fill(empty_BT, -torch.inf), top
