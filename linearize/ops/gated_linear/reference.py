"""Gated linear attention from its definition, quadratic: what every other implementation is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_weights(
    q_BHRF: Tensor,
    k_BHTF: Tensor,
    log_gate_BHTF: Tensor,
    visible_BRT: Tensor,
    *,
    right_BHTF: Tensor | None = None,
    gap: int = 0,
    rows: slice = slice(None),
) -> Tensor:
    """Un-normalised weights [B, H, R, T] of the queries `rows` (R of them) on all keys.

    sum_f q_tf k_sf exp(sum of log_gate_uf over the tokens u passed): u = s + gap + 1 .. t for keys on the left,
    u = t .. s - gap - 1 for keys on the right, whose gates are right_BHTF (None: the same); 0 where not visible.
    Gates may be broadcastable along B, H and F.
    """
    T = k_BHTF.shape[2]
    column_T = torch.arange(T, device=k_BHTF.device)
    t_R1, s_T = column_T[rows, None], column_T
    sides = [log_gate_BHTF] if right_BHTF is None else [log_gate_BHTF, right_BHTF]
    before = [F.pad(g.cumsum(2), (0, 0, 1, 0)) for g in sides]  # of all tokens before column 0 .. T
    left_RT = t_R1 >= s_T
    last = torch.where(left_RT, t_R1 + 1, (s_T - gap).clamp(min=0))
    first = torch.where(left_RT, (s_T + gap + 1).clamp(max=T), t_R1)
    total = q_BHRF.new_zeros(())
    narrow = all(g.shape[-1] == 1 for g in sides)
    for part in torch.arange(q_BHRF.shape[-1]).split(q_BHRF.shape[-1] if narrow else 8):  # never all of B H R T F
        f = slice(int(part[0]), int(part[-1]) + 1)
        passed = [x[:, :, last] - x[:, :, first] for x in (b if b.shape[-1] == 1 else b[..., f] for b in before)]
        total_RT = passed[0] if right_BHTF is None else torch.where(left_RT[..., None], *passed)
        fade = total_RT.masked_fill(~visible_BRT[:, None, ..., None], -torch.inf).exp()
        if narrow:
            total = (q_BHRF @ k_BHTF.mT) * fade[..., 0]
        else:
            total = total + torch.einsum("bhrf,bhtf,bhrtf->bhrt", q_BHRF[..., f], k_BHTF[..., f], _heads(fade, q_BHRF))
    return total


def _heads(fade: Tensor, like: Tensor) -> Tensor:
    return fade.expand(like.shape[0], like.shape[1], *fade.shape[2:])


def gated_linear_reference(
    q_BHTF: Tensor,
    k_BJTF: Tensor,
    v_BGTV: Tensor,
    log_gate_BJTF: Tensor,
    state_BJFV1: Tensor | None,
    segments_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o_t = q_t S_t and S_T of S_t = diag(exp g_t) S_{t-1} + k_t [v_t, 1]^T; in the inputs' dtype."""
    (B, H, T, _), J = q_BHTF.shape, k_BJTF.shape[1]
    v_BJTV1 = torch.cat([v_BGTV, torch.ones_like(v_BGTV[..., :1])], -1).repeat_interleave(J // v_BGTV.shape[1], 1)

    def wide(x: Tensor) -> Tensor:
        return x.repeat_interleave(H // J, 1) if x.shape[1] == J else x

    visible_BTT = torch.ones(B, T, T, dtype=torch.bool, device=q_BHTF.device).tril()
    first_BT = visible_BTT[:, :, 0]  # all true: tokens of the document that `state` belongs to
    last_BT = first_BT
    if segments_BT is not None:
        visible_BTT = visible_BTT & (segments_BT[:, :, None] == segments_BT[:, None])
        first_BT, last_BT = segments_BT == segments_BT[:, :1], segments_BT == segments_BT[:, -1:]
    out = gated_weights(q_BHTF, wide(k_BJTF), wide(log_gate_BJTF), visible_BTT) @ wide(v_BJTV1)
    so_far = log_gate_BJTF.cumsum(2)
    keys = k_BJTF * (so_far[:, :, -1:] - so_far).exp() * last_BT[:, None, :, None]
    state = keys.mT @ v_BJTV1
    if state_BJFV1 is not None:
        readers = q_BHTF * wide(so_far).exp() * first_BT[:, None, :, None]
        out = out + readers @ wide(state_BJFV1)
        left = so_far[:, :, -1].exp()[..., None] * state_BJFV1
        state = state + left * first_BT[:, -1].view(B, 1, 1, 1)
    return out, state
