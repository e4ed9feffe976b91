"""Exact softmax over chosen blocks of keys: `block_softmax`. SEA (2310.01777) with blocks in place of its pixels; which
are chosen is in pixels.py."""

from __future__ import annotations

from torch import Tensor, bfloat16

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


def _triton_refuses(q, k, v, *rest) -> str | None:
    # wider rows of float32, which float16 becomes, do not fit the registers
    narrow = any(x.dtype != bfloat16 for x in (q, k, v))
    return softmax_kernels_refuse(q, k, v, largest=128 if narrow else 256)


IMPLEMENTATIONS = (
    Implementation("triton", _triton, _triton_refuses, device="cuda"),
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
