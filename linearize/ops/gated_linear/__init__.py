"""Linear attention with a decaying state and its normaliser: `gated_linear`, and the same from both sides. Equations:
GLA (2312.06635) section 4, on [v, 1] as LAWCAT (2509.18467) has it; README.md here."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, compute_dtype
from linearize.ops.bidirectional import BidirectionalOutput
from linearize.ops.bidirectional.torch import late
from linearize.ops.gated_linear.reference import gated_linear_reference, gated_weights
from linearize.ops.gated_linear.torch import gated_linear_torch
from linearize.ops.linear import LinearOutput

__all__ = ["IMPLEMENTATIONS", "gated_bidirectional", "gated_linear", "gated_weights"]


def _reference(q, k, v, log_gate, state, segments, chunk):
    return gated_linear_reference(q, k, v, log_gate, state, segments)


IMPLEMENTATIONS = (Implementation("torch", gated_linear_torch), Implementation("reference", _reference))


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
    document numbers; documents never read each other, `state` belongs to the first one.
    Everything is accumulated in float32 or float64. Raises InputError for an unknown or refusing `impl`.
    """
    dtype = compute_dtype(q_BHTF, k_BJTF, v_BGTV)
    q, k, v, g = (x.to(dtype) for x in (q_BHTF, k_BJTF, v_BGTV, log_gate))
    g = g[(None,) * (4 - g.ndim)]
    g = g.expand(*g.shape[:2], k.shape[2], g.shape[3])
    state = None if state is None else state.to(dtype)
    run = choose("gated_linear", IMPLEMENTATIONS, impl, q, k, v, g).run
    out, state = run(q, k, v, g, state, segments_BT, chunk)
    return LinearOutput(out[..., :-1], out[..., -1], state)


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
