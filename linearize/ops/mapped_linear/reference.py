"""Causal linear attention with its feature maps, from its definition, quadratic."""

from __future__ import annotations

from torch import Tensor

from linearize.ops._dispatch import compute_dtype
from linearize.ops._maps import MAPS
from linearize.ops.linear.reference import linear_reference


def features(x_BHTK: Tensor, name: str, weight_HKC: Tensor | None, bias_HC: Tensor | None) -> Tensor:
    """Phi(x W + b), in x's dtype: [B, H, T, F]."""
    u = x_BHTK if weight_HKC is None else x_BHTK @ weight_HKC.to(x_BHTK.dtype)
    u = u if bias_HC is None else u + bias_HC.to(u.dtype)[:, None]
    return MAPS[name].run(u)


def mapped_linear_reference(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    weight_q_HKC: Tensor | None,
    weight_k_JKC: Tensor | None,
    bias_q_HC: Tensor | None,
    bias_k_JC: Tensor | None,
    valid_BT: Tensor | None,
    segments_BT: Tensor | None,
    state_BJFV1: Tensor | None,
    name: str,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output_BHTV, mass_BHT, state): numerator / (mass + eps) of linear attention over mapped q and k."""
    H, G = q_BHTK.shape[1], k_BGTK.shape[1]
    dtype, high = q_BHTK.dtype, compute_dtype(q_BHTK)
    q_BHTK, k_BGTK, v_BGTV = q_BHTK.to(high), k_BGTK.to(high), v_BGTV.to(high)
    phi_q = features(q_BHTK, name, weight_q_HKC, bias_q_HC)
    phi_k = features(k_BGTK.repeat_interleave(key_heads // G, 1), name, weight_k_JKC, bias_k_JC)
    if valid_BT is not None:
        phi_k = phi_k * valid_BT[:, None, :, None]
    each = H // key_heads
    v, state = v_BGTV.repeat_interleave(H // G, 1), state_BJFV1
    if state is not None:
        state = state.to(high).repeat_interleave(each, 1)
    out, state = linear_reference(phi_q, phi_k.repeat_interleave(each, 1), v, state, segments_BT)
    return (out[..., :-1] / (out[..., -1:] + eps)).to(dtype), out[..., -1], state[:, ::each]
