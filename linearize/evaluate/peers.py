"""Linear attention as transformers computes it where no kernel is installed: peers of `kernels.py`.

Other functions than Hedgehog, of like state: the gated delta rule of Qwen3-Next (2412.06464) and MiniMax's lightning
attention (2501.08313). Each is checked against its own recurrence.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.seams import hf

if TYPE_CHECKING:
    from linearize.evaluate.kernels import Inputs

#: of the delta rule: how far a token writes over what its key held, and the log gate
BETA, GATE = 0.5, -0.01


def delta_rule(x: Inputs) -> Tensor:
    """transformers' chunked form; raises ImportError where it has none."""
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    flat = q.new_ones(q.shape[:-1])
    out = hf.chunked_delta_rule()(q, k, v, GATE * flat, BETA * flat, use_qk_l2norm_in_kernel=True)[0]
    return out.transpose(1, 2)


def delta_rule_definition(x: Inputs) -> Tensor:
    """S_t = exp(g) S_{t-1} + b k_t (v_t - exp(g) S_{t-1}^T k_t)^T, o_t = S_t^T q_t / sqrt(K), q and k of length 1."""
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (x.q, x.k))
    state, fade = q.new_zeros(*q.shape[:2], q.shape[-1], x.v.shape[-1]), torch.tensor(GATE, dtype=q.dtype).exp()
    outs = []
    for q_t, k_t, v_t in zip(*(t.unbind(2) for t in (q, k, x.v)), strict=True):
        state = state * fade
        wrong = v_t - (k_t[..., None, :] @ state)[..., 0, :]
        state = state + BETA * k_t[..., None] * wrong[..., None, :]
        outs.append((q_t[..., None, :] @ state)[..., 0, :] * q.shape[-1] ** -0.5)
    return torch.stack(outs, 2)


class _Half(nn.Module):
    """In the place of a gate's projection: sigmoid(0)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], x.shape[-1] // 3)


@functools.cache
def _bare(heads: int, dim: int, device: torch.device) -> Any:
    layer = hf.lightning_attention(heads, dim)
    layer.qkv_proj, layer.act_fn, layer.norm, layer.out_proj = (nn.Identity() for _ in range(4))
    layer.output_gate = _Half()
    return layer.to(device)


def lightning(x: Inputs) -> Tensor:
    """transformers' layer without its projections and its norm; raises ImportError where it has none."""
    _, heads, _, dim = x.q.shape
    layer = _bare(heads, dim, x.q.device)
    hidden = torch.cat([x.q, x.k, x.v], -1).transpose(1, 2).flatten(2)
    out = layer(hidden, position_embeddings=None, attention_mask=None)[0]
    return out.unflatten(-1, (heads, dim)).transpose(1, 2)


def lightning_definition(x: Inputs) -> Tensor:
    """o_t = sum over s <= t of exp(-r (t - s)) (q_t k_s) v_s, half of it; r falls from head to head."""
    _, heads, T, dim = x.q.shape
    rates = hf.lightning_attention(heads, dim).slope_rate.to(x.q)
    steps = torch.arange(T, device=x.q.device, dtype=x.q.dtype)
    weights = (-rates * (steps[:, None] - steps)).exp().tril()
    return 0.5 * (x.q @ x.k.mT * weights) @ x.v


def missing() -> str | None:
    """Why this transformers has no such peers, or None."""
    try:
        for peer in (hf.chunked_delta_rule, lambda: hf.lightning_attention(2, 8)):
            peer()
    except (ImportError, AttributeError) as error:
        return str(error)
    return None
