"""The GPU kernels of `topk`: softmax of the queries of a block over the keys of the blocks that are kept for them.

    lists             which blocks a row (or a column) of the mask over blocks keeps, one after the other
    forward           output and log-sum-exp
    back_q, back_k    gradients, from the lists of rows and those of columns; back_k also those of the values

A program has OWN tokens of one block, or all where it is smaller, and reads the listed blocks' tokens by tiles of READ,
whatever a block's size: a tile's rows are gathered, and small blocks share one. Nothing else is read: work is in
proportion to the kept pairs of blocks. A product takes operands of type DT with precision PREC; scores, weights and
sums are float32, and are added up in the order of the lists.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops._triton import dot, load, store, total_of

NONE = tl.constexpr(-float("inf"))


@triton.jit
def lists(kept, index, counts, n, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """index[r, : counts[r]] = the blocks kept in row r of each mask [n, n], rising; COLUMNS: in column r."""
    r, mask = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kept += mask * n * n
    count = tl.zeros([1], tl.int32)
    for first in range(0, n, BLOCK):
        j = first + tl.arange(0, BLOCK)
        place = j.to(tl.int64) * n + r if COLUMNS else r.to(tl.int64) * n + j
        here = (tl.load(kept + place, mask=j < n, other=0) != 0).to(tl.int32)
        tl.store(index + (mask * n + r) * n + count + tl.cumsum(here, 0) - 1, j, mask=here != 0)
        count += tl.sum(here, 0)
    tl.store(counts + mask * n + r + tl.arange(0, 1), count)


@triton.jit
def _own(block, T, OWN: tl.constexpr):
    """(the block a program has a part of, its tokens, T where there is none)."""
    parts = (block + OWN - 1) // OWN
    i = tl.program_id(0) // parts
    at = (tl.program_id(0) % parts) * OWN + tl.arange(0, OWN)
    return i, tl.where(at < block, tl.minimum(i * block + at, T), T)


@triton.jit
def _listed(index, count, c, block, T, READ: tl.constexpr):
    """The tokens of tile c of the listed blocks, T where there is none."""
    at = c * READ + tl.arange(0, READ)
    place = at // block
    first = tl.load(index + place, mask=place < count, other=0) * block
    return tl.where(place < count, tl.minimum(first + at % block, T), T)


@triton.jit
def _counts(valid, b, t, T, VALID: tl.constexpr):
    """Which tokens are keys."""
    real = t < T
    if VALID:
        real = real & (tl.load(valid + b * T + t, mask=real, other=0) != 0)
    return real


@triton.jit
def _scores(q, k, t_q, t_k, keys, T, scale, CAUSAL: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):
    """Scores of queries on keys, -inf where they are not seen."""
    seen = keys[None, :] & (t_q < T)[:, None]
    if CAUSAL:
        seen = seen & (t_q[:, None] >= t_k[None, :])
    return tl.where(seen, dot(q, tl.trans(k), DT, PREC) * scale, NONE)


@triton.jit
def forward(q, k, v, valid, index, counts, out, lse, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, T, H, G, n,
            block, scale, K: tl.constexpr, V: tl.constexpr, VALID: tl.constexpr, CAUSAL: tl.constexpr,
            DT: tl.constexpr, PREC: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr, BK: tl.constexpr,
            BV: tl.constexpr):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * sk_b + (h // (H // G)) * sk_h
    v += b * sv_b + (h // (H // G)) * sv_h
    i, t_q = _own(block, T, OWN)
    f_q = load(q + b * sq_b + h * sq_h, t_q, T, 0, K, BK, sq_t)
    count = tl.load(counts + bh * n + i)
    index += (bh * n + i) * n
    most, mass = tl.full([OWN], NONE, tl.float32), tl.zeros([OWN], tl.float32)
    read = tl.zeros([OWN, BV], tl.float32)
    for c in range((count * block + READ - 1) // READ):
        t_k = _listed(index, count, c, block, T, READ)
        keys = _counts(valid, b, t_k, T, VALID)
        scores = _scores(f_q, load(k, t_k, T, 0, K, BK, sk_t), t_q, t_k, keys, T, scale, CAUSAL, DT, PREC)
        more = tl.maximum(most, tl.max(scores, 1))
        safe = tl.where(more == NONE, 0.0, more)
        weights, left = tl.exp(scores - safe[:, None]), tl.exp(most - safe)
        mass = mass * left + tl.sum(weights, 1)
        read = read * left[:, None] + dot(weights, load(v, t_k, T, 0, V, BV, sv_t), DT, PREC)
        most = more
    filled = tl.where(mass > 0, mass, 1.0)
    store(out + bh * T * V, read / filled[:, None], t_q, T, 0, V, BV)
    tl.store(lse + bh * T + t_q, tl.where(mass > 0, most + tl.log(filled), NONE), mask=t_q < T)


@triton.jit
def back_q(q, k, v, valid, index, counts, lse, d_out, lost, d_q, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
           T, H, G, n, block, scale, K: tl.constexpr, V: tl.constexpr, VALID: tl.constexpr, CAUSAL: tl.constexpr,
           DT: tl.constexpr, PREC: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr, BK: tl.constexpr,
           BV: tl.constexpr):  # fmt: skip
    """lost: what normalising takes, the sum of d out * out."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * sk_b + (h // (H // G)) * sk_h
    v += b * sv_b + (h // (H // G)) * sv_h
    i, t_q = _own(block, T, OWN)
    f_q = load(q + b * sq_b + h * sq_h, t_q, T, 0, K, BK, sq_t)
    d_o = load(d_out + bh * T * V, t_q, T, 0, V, BV, V)
    total = total_of(lse + bh * T, t_q, t_q < T)
    taken = tl.load(lost + bh * T + t_q, mask=t_q < T, other=0.0)
    count = tl.load(counts + bh * n + i)
    index += (bh * n + i) * n
    d = tl.zeros([OWN, BK], tl.float32)
    for c in range((count * block + READ - 1) // READ):
        t_k = _listed(index, count, c, block, T, READ)
        keys = _counts(valid, b, t_k, T, VALID)
        f_k = load(k, t_k, T, 0, K, BK, sk_t)
        d_weights = dot(d_o, tl.trans(load(v, t_k, T, 0, V, BV, sv_t)), DT, PREC)
        scores = _scores(f_q, f_k, t_q, t_k, keys, T, scale, CAUSAL, DT, PREC)
        d_scores = tl.exp(scores - total[:, None]) * (d_weights - taken[:, None])
        d += dot(d_scores, f_k, DT, PREC)
    store(d_q + bh * T * K, d * scale, t_q, T, 0, K, BK)


@triton.jit
def back_k(q, k, v, valid, index, counts, lse, d_out, lost, d_k, d_v, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h,
           sv_t, T, H, G, n, block, scale, K: tl.constexpr, V: tl.constexpr, VALID: tl.constexpr,
           CAUSAL: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, OWN: tl.constexpr, READ: tl.constexpr,
           BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """From the blocks of queries that read a block, of all heads that share its keys: d k and d v."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    j, t_k = _own(block, T, OWN)
    f_k = load(k + b * sk_b + g * sk_h, t_k, T, 0, K, BK, sk_t)
    f_v = load(v + b * sv_b + g * sv_h, t_k, T, 0, V, BV, sv_t)
    keys = _counts(valid, b, t_k, T, VALID)
    d_keys, d_values = tl.zeros([OWN, BK], tl.float32), tl.zeros([OWN, BV], tl.float32)
    for r in range(H // G):
        h = g * (H // G) + r
        bh = b * H + h
        count = tl.load(counts + bh * n + j)
        for c in range((count * block + READ - 1) // READ):
            t_q = _listed(index + (bh * n + j) * n, count, c, block, T, READ)
            f_q = load(q + b * sq_b + h * sq_h, t_q, T, 0, K, BK, sq_t)
            d_o = load(d_out + bh * T * V, t_q, T, 0, V, BV, V)
            scores = _scores(f_q, f_k, t_q, t_k, keys, T, scale, CAUSAL, DT, PREC)
            weights = tl.exp(scores - total_of(lse + bh * T, t_q, t_q < T)[:, None])
            d_values += dot(tl.trans(weights), d_o, DT, PREC)
            taken = tl.load(lost + bh * T + t_q, mask=t_q < T, other=0.0)
            d_scores = weights * (dot(d_o, tl.trans(f_v), DT, PREC) - taken[:, None])
            d_keys += dot(tl.trans(d_scores), f_q, DT, PREC)
    store(d_k + bg * T * K, d_keys * scale, t_k, T, 0, K, BK)
    store(d_v + bg * T * V, d_values, t_k, T, 0, V, BV)
