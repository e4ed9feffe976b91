"""Exact softmax over chosen blocks of keys: `block_softmax`. SEA (2310.01777) with blocks in place of its pixels; which
are chosen is in pixels.py."""

from __future__ import annotations

from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, compute_dtype
from linearize.ops.topk.reference import blocks_reference
from linearize.ops.topk.torch import blocks_torch

IMPLEMENTATIONS = (Implementation("torch", blocks_torch), Implementation("reference", blocks_reference))


def block_softmax(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    kept_BHIJ: Tensor,
    *,
    block: int,
    scale: float,
    causal: bool,
    valid_BT: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """o_BHTV of softmax over the keys in those of the J = I = ceil(T / block) blocks that are kept for the query's own.

    kept_BHIJ: bool, in causal attention no block after the query's own. valid_BT: keys that are real (None: all).
    A query that sees nothing gets 0. Computed in float32 (float64 for float64 inputs). Raises InputError for an unknown
    `impl`.
    """
    dtype = compute_dtype(q_BHTK, k_BGTK, v_BGTV)
    q, k, v = q_BHTK.to(dtype), k_BGTK.to(dtype), v_BGTV.to(dtype)
    run = choose("topk", IMPLEMENTATIONS, impl, q, k, v).run
    return run(q, k, v, kept_BHIJ, block, scale, causal, valid_BT)
