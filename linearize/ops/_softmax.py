"""What exact branches share: softmax left un-normalised, so that its mass can be merged with another's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """exp(score - safe), their sum over the keys, its log-sum-exp and the largest score (both -inf where nothing is
    seen). filled: mass, never 0: what to divide by."""

    exp: Tensor
    filled: Tensor
    lse: Tensor
    max: Tensor


def weigh(scores: Tensor) -> Weights:
    """Softmax of `scores` [..., S], -inf at keys that are not seen. Rows that see nothing get weights and gradients of
    0, never NaN."""
    top = scores.amax(-1)
    safe = top.clamp(min=torch.finfo(scores.dtype).min).detach()  # sees nothing: -inf - finite = -inf, exp = 0
    weights = (scores - safe[..., None]).exp()
    mass = weights.sum(-1)
    filled = mass.clamp(min=torch.finfo(scores.dtype).tiny)  # also keeps the gradient of rows that see nothing at 0
    return Weights(weights, filled, torch.where(mass > 0, safe + filled.log(), -torch.inf), top)


def attend(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float, valid_BS: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output_BHTV, lse_BHT, max_BHT) of softmax over all keys that are valid; 0, -inf, -inf where there are none."""
    if k_BHSK.shape[2] == 0:
        nothing = q_BHTK.new_full(q_BHTK.shape[:3], -torch.inf)
        return q_BHTK.new_zeros(*q_BHTK.shape[:3], v_BHSV.shape[-1]), nothing, nothing
    scores = q_BHTK @ k_BHSK.mT * scale
    if valid_BS is not None:
        scores = scores.masked_fill(~valid_BS[:, None, None], -torch.inf)
    weights, filled, lse, top = weigh(scores)
    return (weights @ v_BHSV) / filled[..., None], lse, top


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of softmax over the keys of both; -inf where neither sees anything."""
    top = torch.maximum(lse_a, lse_b)
    safe = top.masked_fill(top == -torch.inf, 0).detach()
    a, b = (lse_a - safe).exp(), (lse_b - safe).exp()
    mass = (a + b).clamp(min=torch.finfo(a.dtype).tiny)
    out = (a[..., None] * out_a + b[..., None] * out_b) / mass[..., None]
    return out, torch.where(top == -torch.inf, top, safe + mass.log())
