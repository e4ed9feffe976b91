"""Gated linear attention in chunks, plain torch: O(T), any device, differentiable once.

A chunk whose gates keep more than exp(-MILD) of everything is one matrix product: queries times exp(G), keys times
exp(-G), G summed from its start (Lizard's form, 2507.09025). One that fades by somewhat more is halved, and halved
again. In any other, blocks are merged in pairs, 1 + 1, 2 + 2, ... tokens. Queries carry what they faded since their
block began, keys what they will have faded when theirs ends; later queries on earlier keys of a pair are then one
matrix product. There only exponentials of sums of log gates occur, all at most 1: no exp(-G) and no differences of
sums, so that strong gates neither overflow nor lose digits. GLA's secondary chunks (2312.06635) take differences; here
log2(chunk) rounds of O(TF) stand in their place. The state changes by expm1: float32 rounds gates near 1 badly.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

#: nats that a chunk may fade by and still be one product: exp(16) costs float32 no digit that the sums have
MILD = 16.0


def gated_linear_torch(
    q_BHTF: Tensor,
    k_BJTF: Tensor,
    v_BGTV: Tensor,
    log_gate_BJTF: Tensor,
    state_BJFV1: Tensor | None,
    segments_BT: Tensor | None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same as gated_linear_reference."""
    (J, T, N), group = k_BJTF.shape[1:], q_BHTF.shape[1] // k_BJTF.shape[1]
    v = torch.cat([v_BGTV, torch.ones_like(v_BGTV[..., :1])], -1)
    v = v.repeat_interleave(J // v.shape[1], 1) if v.shape[1] != J else v
    if group > 1:  # the query heads of a group share keys, gates and state
        q, k, v, g = q_BHTF.unflatten(1, (J, group)), *(x[:, :, None] for x in (k_BJTF, v, log_gate_BJTF))
        state = None if state_BJFV1 is None else state_BJFV1[:, :, None]
    else:
        q, k, g, state = q_BHTF, k_BJTF, log_gate_BJTF, state_BJFV1
    if state is None:
        state = k.new_zeros(*k.shape[:-2], N, v.shape[-1])
    if T == 1 and segments_BT is None:
        state = _faded(state, g) + k.mT * v
        out = q @ state
    elif torch.compiler.is_exporting():
        out, state = _blocks(q, k, v, g, state, segments_BT, chunk)
    else:
        out, state = _loop(q, k, v, g, state, segments_BT, chunk)
    return (out.flatten(1, 2), state.squeeze(2)) if group > 1 else (out, state)


def _loop(q, k, v, g, state: Tensor, segments_BT: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    outs, stop = [], 0
    last_B1 = None if segments_BT is None else segments_BT[:, :1]
    # Split, not sliced: the gradient of a slice is as long as the sequence, and of as many slices quadratic.
    sizes = _sizes(g, chunk)
    for *parts, v_C in zip(*(x.split(sizes, -2) for x in (q, k, g, v)), strict=True):
        part = slice(stop, stop := stop + v_C.shape[-2])
        weights, from_start, to_end = _mild_chunk(*parts) if mild(parts[-1]) else _chunk(*parts)
        carried = state
        if segments_BT is not None:
            assert last_B1 is not None
            seg_BC = segments_BT[:, part]
            now_B1 = seg_BC[:, -1:]
            shape = (-1, *[1] * (q.ndim - 3))
            weights = weights * (seg_BC[:, :, None] == seg_BC[:, None]).view(*shape, *weights.shape[-2:])
            from_start = from_start * (seg_BC == last_B1).view(*shape, v_C.shape[-2], 1)
            to_end = to_end * (seg_BC == now_B1).view(*shape, v_C.shape[-2], 1)
            carried, last_B1 = state * (now_B1 == last_B1).view(*shape, 1, 1), now_B1
        outs.append(weights @ v_C + from_start @ state)
        state = _faded(carried, parts[-1]) + to_end.mT @ v_C
    return torch.cat(outs, -2) if len(outs) > 1 else outs[0], state


def _sizes(g_TF: Tensor, chunk: int) -> list[int]:
    """Tokens of each chunk: `chunk`, or half or a quarter of it where that makes them mild."""
    few, sizes = max(1, chunk // 4), []
    todo = list(g_TF.detach().split(chunk, -2))[::-1]
    while todo:
        part = todo.pop()
        C = part.shape[-2]
        if few < C and part.shape[-1] > 1 and _readable(part) and MILD <= _fading(part) < MILD * C / few:
            todo += part.split(-(-C // 2), -2)[::-1]
        else:
            sizes.append(C)
    return sizes


def _faded(state: Tensor, g_CF: Tensor) -> Tensor:
    """The state after the gates of these tokens."""
    return state + g_CF.sum(-2, keepdim=True).expm1().mT * state


def _blocks(q, k, v, g, state: Tensor, segments_BT: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    """All chunks at once, so that a length may stay symbolic (torch.export); quadratic in the number of chunks."""
    T = k.shape[-2]
    count = T // chunk + 1  # always some padding: a length that fills its chunks is no special case then
    missing = count * chunk - T
    q, k, v, g = (F.pad(x, (0, 0, 0, missing)).unflatten(-2, (count, chunk)) for x in (q, k, v, g))
    weights, from_start, to_end = _chunk(q, k, g)
    order = torch.arange(count, device=k.device)
    reads_NM = order[:, None] >= order  # after chunk n, what chunk m left is still there
    carries_N = torch.ones_like(order, dtype=torch.bool)
    if segments_BT is not None:
        shape = (-1, *[1] * (q.ndim - 4))
        seg_BNC = torch.cat([segments_BT, segments_BT[:, -1:].expand(-1, missing)], 1).unflatten(1, (count, chunk))
        first_B1, end_BN = segments_BT[:, :1], seg_BNC[:, :, -1]
        carried_BN = torch.cat([first_B1, end_BN], 1)[:, :-1]  # the document of a chunk's incoming state
        weights = weights * (seg_BNC[..., None] == seg_BNC[..., None, :]).view(*shape, count, chunk, chunk)
        from_start = from_start * (seg_BNC == carried_BN[..., None]).view(*shape, count, chunk, 1)
        to_end = to_end * (seg_BNC == end_BN[..., None]).view(*shape, count, chunk, 1)
        reads_NM = reads_NM & (end_BN[:, :, None] == end_BN[:, None]).view(*shape, count, count)
        carries_N = (end_BN == first_B1).view(*shape, count)
    sums = g.sum(-2).cumsum(-2)
    fading = (sums[..., :, None, :] - sums[..., None, :, :]).masked_fill(~reads_NM[..., None], -torch.inf).exp()
    left = to_end.mT @ v
    after = torch.einsum("...nmf,...mfv->...nfv", fading.expand(*fading.shape[:-1], k.shape[-1]), left)
    after = after + (sums.exp() * carries_N[..., None])[..., None] * state[..., None, :, :]
    before = torch.cat([state[..., None, :, :], after], -3)[..., :-1, :, :]
    out = weights @ v + from_start @ before
    return out.flatten(-3, -2)[..., :T, :], after[..., -1, :, :]


def mild(g_CF: Tensor) -> bool:
    """Whether these gates fade so little. Asked only where the answer does not stop a device or a tracer."""
    return _readable(g_CF) and g_CF.shape[-1] > 1 and _fading(g_CF) < MILD


def _fading(g_CF: Tensor) -> float:
    return -float(g_CF.detach().sum(-2).amin())


def _readable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _mild_chunk(q_CF: Tensor, k_CF: Tensor, g_CF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept_CF = g_CF.cumsum(-2).exp()
    late_q, early_k = q_CF * kept_CF, k_CF / kept_CF
    return (late_q @ early_k.mT).tril(), late_q, early_k * g_CF.sum(-2, keepdim=True).exp()


def _chunk(q_CF: Tensor, k_CF: Tensor, g_CF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [.., C, C] of each query on each key up to itself, queries faded since the chunk began, keys faded to
    its end)."""
    if g_CF.shape[-1] == 1:
        return _chunk_of_one_gate(q_CF, k_CF, g_CF)
    C = k_CF.shape[-2]
    missing = (1 << (C - 1).bit_length()) - C
    if missing:
        q_CF, k_CF, g_CF = (F.pad(x, (0, 0, 0, missing)) for x in (q_CF, k_CF, g_CF))
    weights, from_start, to_end = _Pairs.apply(q_CF, k_CF, g_CF)
    return weights[..., :C, :C], from_start[..., :C, :], to_end[..., :C, :]


def _chunk_of_one_gate(q_CF: Tensor, k_CF: Tensor, g_C1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C = k_CF.shape[-2]
    # Sums from the token after the key to the query, by additions alone.
    passed_CC = g_C1.expand(*g_C1.shape[:-1], C).tril(-1).cumsum(-2)
    weights = (q_CF @ k_CF.mT * passed_CC.exp()).tril()
    return weights, q_CF * g_C1.cumsum(-2).exp(), k_CF * passed_CC[..., -1, :, None].exp()


class _Pairs(torch.autograd.Function):
    """`_chunk` for a power of two of tokens, by merging blocks in pairs. Of every round is kept what the matrix product
    took. The gradient of a gate is that of all sums it is in: q dq - k dk of the tokens from it on."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        C, gate = q.shape[-2], g.exp()
        weights = (q * k).sum(-1).diag_embed()
        from_start, to_end, sums = (
            q * gate,
            k.clone(),
            g.unsqueeze(-2),
        )  # sums: of each block's gates, [.., blocks, 1, F]
        kept, half = [], 1
        while half < C:
            late_q, early_k = _pair(from_start, half)[1], _pair(to_end, half)[0]
            early, late = sums.exp().unflatten(-3, (-1, 2)).unbind(-3)
            kept += [late_q.clone(), early_k.clone(), early, late]
            _cross(weights, half).copy_(kept[-4] @ kept[-3].mT)
            late_q *= early
            early_k *= late
            sums, half = sums[..., ::2, :, :] + sums[..., 1::2, :, :], 2 * half
        ctx.save_for_backward(q, k, gate, to_end, *kept)
        return weights, from_start, to_end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        dweights, dfrom, dto = grad_outputs
        q, k, gate, to_end, *kept = ctx.saved_tensors
        dq, dk, half = dfrom.clone(), dto.clone(), q.shape[-2] // 2
        while half:
            *kept, late_q, early_k, early, late = kept
            dcross = _cross(dweights, half)
            dlate, dearly = _pair(dq, half)[1], _pair(dk, half)[0]
            dlate.mul_(early).add_(dcross @ early_k)
            dearly.mul_(late).add_((dcross.mT @ late_q).sum_to_size(dearly.shape))
            half //= 2
        dq *= gate
        dsums = (q * dq).sum_to_size(k.shape) - k * dk  # a token on itself passes no gate
        from_here = torch.ones(2 * (q.shape[-2],), dtype=q.dtype, device=q.device).triu()
        dgate = (from_here @ dsums + (to_end * dto).sum(-2, keepdim=True)).sum_to_size(gate.shape)
        own = dweights.diagonal(dim1=-2, dim2=-1)[..., None]
        return dq + own * k, dk + (own * q).sum_to_size(k.shape), dgate


def _pair(x_CF: Tensor, half: int) -> tuple[Tensor, ...]:
    """The early and the late halves [.., pairs, half, F] of each pair of blocks: views."""
    pairs = x_CF.unflatten(-2, (-1, 2, half))
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _cross(x_CC: Tensor, half: int) -> Tensor:
    """Late queries on early keys of each pair of blocks [.., pairs, half, half]: a view."""
    pairs = x_CC.unflatten(-1, (-1, 2 * half)).unflatten(-3, (-1, 2 * half)).diagonal(dim1=-4, dim2=-2)
    return pairs.movedim(-1, -3)[..., half:, :half]
