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
