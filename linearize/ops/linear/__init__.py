"""Causal linear attention with its normaliser: `linear`. Equations: Hedgehog (2402.04347) section 4, README.md here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, stack

from linearize.ops._dispatch import Implementation, choose, compute_dtype
from linearize.ops.linear.reference import linear_reference
from linearize.ops.linear.torch import linear_torch


class LinearOutput(NamedTuple):
    """numerator_BHTV and normaliser_BHT (their ratio is the attention output), state_BHFV1 after the last token."""

    numerator: Tensor
    normaliser: Tensor
    state: Tensor


def _reference(q, k, v, state, segments, chunk):
    return linear_reference(q, k, v, state, segments)


IMPLEMENTATIONS = (Implementation("torch", linear_torch), Implementation("reference", _reference))


def linear(
    q_BHTF: Tensor,
    k_BHTF: Tensor,
    v_BGTV: Tensor,
    *,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    chunk: int = 64,
    impl: str = "auto",
) -> LinearOutput:
    """Causal linear attention over features, un-normalised, on [v, 1].

    q_BHTF, k_BHTF: non-negative features of queries and keys; padding is a key of zeros. k may have G heads (one map
    per key/value head): each then serves H / G query heads. v_BGTV: values, G dividing H.
    state: float32 (float64 for float64 inputs) [B, heads of k, F, V+1], the normaliser in its last column.
    segments_BT: document numbers; documents never read each other, `state` belongs to the first one.
    Everything is accumulated in float32 or float64. Raises InputError for an unknown or refusing `impl`.
    """
    dtype = compute_dtype(q_BHTF, k_BHTF, v_BGTV)
    q, k, v = q_BHTF.to(dtype), k_BHTF.to(dtype), v_BGTV.to(dtype)
    state = None if state is None else state.to(dtype)
    B, H, T, F = q.shape
    J = k.shape[1]
    if J != H:  # fold the group into time-independent rows: each key head answers H / J query heads
        return _grouped(q, k, v, state, segments_BT, chunk, impl)
    run = choose("linear", IMPLEMENTATIONS, impl, q, k, v).run
    if v.shape[1] != H and impl == "reference":
        v = v.repeat_interleave(H // v.shape[1], 1)
    out, state = run(q, k, v, state, segments_BT, chunk)
    return LinearOutput(out[..., :-1], out[..., -1], state)


def _grouped(q, k, v, state, segments_BT, chunk, impl) -> LinearOutput:
    # One state per key head: query heads of a group share it, so they are run as separate queries of that head.
    B, H, T, _ = q.shape
    J = k.shape[1]
    outs = []
    new = state
    for member in range(H // J):
        out = linear(
            q[:, member :: H // J],
            k,
            v if v.shape[1] == J else v.repeat_interleave(J // v.shape[1], 1),
            state=state,
            segments_BT=segments_BT,
            chunk=chunk,
            impl=impl,
        )
        outs.append(out)
        new = out.state
    numerator = stack([o.numerator for o in outs], 2).flatten(1, 2)
    normaliser = stack([o.normaliser for o in outs], 2).flatten(1, 2)
    assert new is not None
    return LinearOutput(numerator, normaliser, new)
