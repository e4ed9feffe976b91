"""Linear attention with a decaying state and its normaliser: `gated_linear`, and the same from both sides. Equations:
GLA (2312.06635) section 4, on [v, 1] as LAWCAT (2509.18467) has it; README.md here."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, is_grad_enabled

from linearize.ops._dispatch import Implementation, choose, compute_dtype, kernels_refuse
from linearize.ops.bidirectional import BidirectionalOutput
from linearize.ops.bidirectional.torch import late
from linearize.ops.gated_linear.reference import gated_linear_reference, gated_weights
from linearize.ops.gated_linear.torch import gated_linear_torch
from linearize.ops.linear import LinearOutput

__all__ = ["IMPLEMENTATIONS", "gated_bidirectional", "gated_linear", "gated_weights"]


def _cast(q, k, v, *rest):
    dtype = compute_dtype(q, k, v)
    return [None if x is None else x.to(dtype) for x in (q, k, v, *rest)]


def _split(out: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return out[..., :-1], out[..., -1], state


def _torch(q, k, v, log_gate, state, segments, chunk):
    return _split(*gated_linear_torch(*_cast(q, k, v, log_gate, state), segments, chunk))


def _reference(q, k, v, log_gate, state, segments, chunk):
    return _split(*gated_linear_reference(*_cast(q, k, v, log_gate, state), segments))


def _triton(q, k, v, log_gate, state, segments, chunk):
    from linearize.ops.gated_linear.triton import gated_linear_triton, step_triton

    log_gate = log_gate.expand(*k.shape[:2], -1, -1)
    trains = is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_gate, state))
    if q.shape[2] == 1 and segments is None and not trains:
        return step_triton(q, k, v, log_gate, state)
    return gated_linear_triton(q, k, v, log_gate, state, segments)


def _triton_refuses(q, k, v, *rest) -> str | None:
    reasons = (kernels_refuse(x, x.shape[-1], largest=256) for x in (q, k, v))
    return next((reason for reason in reasons if reason), None)


IMPLEMENTATIONS = (
    Implementation("triton", _triton, _triton_refuses, device="cuda"),
    Implementation("torch", _torch),
    Implementation("reference", _reference),
)


def gated_linear(
    q_BHTF: Tensor,
    k_BJTF: Tensor,
    v_BGTV: Tensor,
    log_gate: Tensor,
    *,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> LinearOutput:
    """Causal linear attention over features whose state fades, un-normalised, on [v, 1].

    q_BHTF, k_BJTF: non-negative features; each of the J key heads has a state and serves H / J query heads. v_BGTV:
    values, G dividing J. log_gate: logarithms of the gates, finite and at most 0, broadcastable to [B, J, T, F]; with a
    last axis of 1 (a gate per head) much is saved. Token t's gate fades what was before it, not its own key. Padding
    is a key of zeros and a log gate of 0.
    state: float32 (float64 for float64 inputs) [B, J, F, V+1], the normaliser in its last column. segments_BT:
    document numbers; documents never read each other, `state` belongs to the first one. chunk: tokens at a time of
    impl "torch"; kernels have their own.
    Everything is accumulated in float32 or float64. Raises InputError for an unknown or refusing `impl`.
    """
    g = log_gate[(None,) * (4 - log_gate.ndim)].to(compute_dtype(q_BHTF, k_BJTF, v_BGTV))
    g = g.expand(*g.shape[:2], k_BJTF.shape[2], g.shape[3])
    run = choose("gated_linear", IMPLEMENTATIONS, impl, q_BHTF, k_BJTF, v_BGTV, g).run
    return LinearOutput(*run(q_BHTF, k_BJTF, v_BGTV, g, state, segments_BT, chunk))


def gated_bidirectional(
    q_BHTF: Tensor,
    k_BJTF: Tensor,
    v_BGTV: Tensor,
    log_gate: Tensor,
    *,
    log_gate_right: Tensor | None = None,
    gap: int = 0,
    segments_BT: Tensor | None = None,
    impl: str = "auto",
) -> BidirectionalOutput:
    """`gated_linear` from the left and from the right, added; a token's own key counts once, unfaded.

    log_gate_right: of what stands on the right of a query, where it fades otherwise than on the left (None: alike).

    On the way from key to query a gate is passed at every token but the key's. gap: keys nearer than this are
    somebody else's, and the others begin to fade `gap` tokens from where they stand. Raises InputError for an unknown
    or refusing `impl`.
    """
    T = q_BHTF.shape[2]
    k, v = late(k_BJTF, v_BGTV, gap, segments_BT)
    left = gated_linear(q_BHTF, k, v, log_gate, segments_BT=segments_BT, impl=impl)
    g = log_gate if log_gate_right is None else log_gate_right
    g = g[(None,) * (4 - g.ndim)]
    g = g.expand(*g.shape[:2], T, g.shape[3])
    # From the right the key itself is left out: one column late, the query then passes its own gate by itself.
    backward = None if segments_BT is None else -segments_BT.flip(1)  # numbers that never decrease
    q, k, v, g = (x.flip(2) for x in (q_BHTF, k_BJTF, v_BGTV, g))
    k, v = late(k, v, max(gap, 1), backward)
    if gap == 0:
        own = g.to(compute_dtype(q)).exp()
        heads = q.shape[1] // own.shape[1] if own.shape[1] > 1 else 1
        q, g = q * own.repeat_interleave(heads, 1), F.pad(g, (0, 0, 1, 0))[:, :, :T]
    right = gated_linear(q, k, v, g, segments_BT=backward, impl=impl)
    return BidirectionalOutput(left.numerator + right.numerator.flip(2), left.normaliser + right.normaliser.flip(2))
