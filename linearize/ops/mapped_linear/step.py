"""One token of `mapped_linear`, as it is decoded: no loop, no operator around it, differentiable as it stands."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._maps import MAPS


def step(
    q_BH1K: Tensor,
    k_BG1K: Tensor,
    v_BG1V: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    valid_B1: Tensor | None,
    state_BJFV1: Tensor | None,
    name: str,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same as mapped_linear_reference for T = 1. Moves the state once in and once out; maps are batched over heads, so
    that no weight is repeated for a sequence."""
    high = torch.float64 if q_BH1K.dtype == torch.float64 else torch.float32
    B, H, J, G = len(q_BH1K), q_BH1K.shape[1], key_heads, k_BG1K.shape[1]
    q_HBK, k_GBK, v_BGV = q_BH1K[:, :, 0].transpose(0, 1), k_BG1K[:, :, 0].transpose(0, 1), v_BG1V[:, :, 0]
    if J != G:
        k_GBK, v_BGV = k_GBK.repeat_interleave(J // G, 0), v_BGV.repeat_interleave(J // G, 1)
    phi_q = _features(q_HBK.to(high), name, weights[0], biases[0])
    phi_k = _features(k_GBK.to(high), name, weights[1], biases[1])
    if valid_B1 is not None:
        phi_k = phi_k * valid_B1
    rows = phi_k.transpose(0, 1).reshape(B * J, -1, 1)
    v1 = torch.cat([v_BGV.to(high), v_BGV.new_ones(B, J, 1, dtype=high)], -1).view(B * J, 1, -1)
    if state_BJFV1 is None:
        new = rows * v1
    else:
        new = torch.baddbmm(state_BJFV1.reshape(B * J, *state_BJFV1.shape[2:]).to(high), rows, v1)
    out = phi_q.transpose(0, 1).reshape(B * J, H // J, -1) @ new
    out = out.view(B, H, 1, -1)
    mass = out[..., -1]
    return (out[..., :-1] / (mass[..., None] + eps)).to(q_BH1K.dtype), mass, new.view(B, J, *new.shape[1:])


def _features(x_HBK: Tensor, name: str, weight_HKC: Tensor | None, bias_HC: Tensor | None) -> Tensor:
    u = x_HBK if weight_HKC is None else x_HBK @ weight_HKC.to(x_HBK.dtype)
    return MAPS[name].run(u if bias_HC is None else u + bias_HC.to(u.dtype)[:, None])
