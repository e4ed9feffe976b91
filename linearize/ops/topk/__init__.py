"""Exact softmax over chosen blocks of keys: `block_softmax`. SEA (2310.01777) with blocks in place of its pixels; which
are chosen is in pixels.py."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, compute_dtype, softmax_kernels_refuse
from linearize.ops.topk.reference import blocks_reference
from linearize.ops.topk.torch import blocks_torch


def _plain(run):
    """In the type of the computation."""

    def plain(q, k, v, *rest):
        dtype = compute_dtype(q, k, v)
        return run(q.to(dtype), k.to(dtype), v.to(dtype), *rest)

    return plain


def _triton(q, k, v, kept, block, scale, causal, valid):
    from linearize.ops.topk.triton import topk_triton

    return topk_triton(q, k, v, kept, valid, block, scale, causal)[0]


IMPLEMENTATIONS = (
    Implementation("triton", _triton, partial(softmax_kernels_refuse, largest=256), device="cuda"),
    Implementation("torch", _plain(blocks_torch)),
    Implementation("reference", _plain(blocks_reference)),
)


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
    A query that sees nothing gets 0. Computed in float32 (float64 for float64 inputs), which is what is returned.
    Raises InputError for an unknown or refusing `impl`.
    """
    run = choose("topk", IMPLEMENTATIONS, impl, q_BHTK, k_BGTK, v_BGTV).run
    return run(q_BHTK, k_BGTK, v_BGTV, kept_BHIJ, block, scale, causal, valid_BT)
