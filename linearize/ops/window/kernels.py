"""The GPU kernels of `window`: softmax of blocks of queries over the blocks of keys that some query of theirs can see.

Query t stands at key column t + S - T and sees the columns from width - 1 before it to `ahead` behind it whose code is
its own and not 0. Blocks of BT tokens read blocks of BS keys; for the gradients of keys and values the other way round.
A product takes operands of type DT with precision PREC; scores, weights and sums are float32.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops._triton import dot, load, store, total_of

NONE = tl.constexpr(-float("inf"))


@triton.jit
def _scores(q, k, at, s, code_q, code_k, width, ahead, scale, DT: tl.constexpr, PREC: tl.constexpr):
    """Of queries at columns `at` on keys at columns s, -inf where they are not seen."""
    apart = at[:, None] - s[None, :]
    seen = (apart >= -ahead) & (apart < width) & (code_q[:, None] == code_k[None, :]) & (code_k > 0)[None, :]
    return tl.where(seen, dot(q, tl.trans(k), DT, PREC) * scale, NONE)


@triton.jit
def _codes(codes, b, t, T):
    """0, which sees nothing and is not seen, behind the end."""
    return tl.load(codes + b * T + t, mask=t < T, other=0)


@triton.jit
def forward(q, k, v, codes_q, codes_k, out, lse, top, which, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, T,
            S, H, G, width, ahead, scale, K: tl.constexpr, V: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
            BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """out, log-sum-exp and maximum of each query's scores, and the key that has the maximum."""
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * sk_b + (h // (H // G)) * sk_h
    v += b * sv_b + (h // (H // G)) * sv_h
    t = n * BT + tl.arange(0, BT)
    at, code_q = t + S - T, _codes(codes_q, b, t, T)
    f_q = load(q + b * sq_b + h * sq_h, t, T, 0, K, BK, sq_t)
    most, mass = tl.full([BT], NONE, tl.float32), tl.zeros([BT], tl.float32)
    read, best = tl.zeros([BT, BV], tl.float32), tl.full([BT], -1, tl.int32)
    first = n * BT + S - T
    last = tl.minimum(tl.minimum(first + BT, S) + ahead, S)
    for i in range(tl.maximum(first - width + 1, 0) // BS, (last + BS - 1) // BS):
        s = i * BS + tl.arange(0, BS)
        scores = _scores(f_q, load(k, s, S, 0, K, BK, sk_t), at, s, code_q, _codes(codes_k, b, s, S), width, ahead,
                         scale, DT, PREC)  # fmt: skip
        here = tl.max(scores, 1)
        found = tl.min(tl.where(scores == here[:, None], s[None, :], S), 1)
        best = tl.where(here > most, found, best)
        more = tl.maximum(most, here)
        safe = tl.where(more == NONE, 0.0, more)
        weights, kept = tl.exp(scores - safe[:, None]), tl.exp(most - safe)
        mass = mass * kept + tl.sum(weights, 1)
        read = read * kept[:, None] + dot(weights, load(v, s, S, 0, V, BV, sv_t), DT, PREC)
        most = more
    filled = tl.where(mass > 0, mass, 1.0)
    store(out + bh * T * V, read / filled[:, None], t, T, 0, V, BV)
    tl.store(lse + bh * T + t, tl.where(mass > 0, most + tl.log(filled), NONE), mask=t < T)
    tl.store(top + bh * T + t, most, mask=t < T)
    tl.store(which + bh * T + t, best, mask=t < T)


@triton.jit
def _gradient(scores, total, d_weights, lost, d_top, best, s):
    """Of the scores. lost: what normalising takes, sum of d out * out - d lse."""
    d = tl.exp(scores - total[:, None]) * (d_weights - lost[:, None])
    return d + tl.where(best[:, None] == s[None, :], d_top[:, None], 0.0)


@triton.jit
def back_q(q, k, v, codes_q, codes_k, lse, which, d_out, lost, d_top, d_q, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b,
           sv_h, sv_t, T, S, H, G, width, ahead, scale, K: tl.constexpr, V: tl.constexpr, DT: tl.constexpr,
           PREC: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * sk_b + (h // (H // G)) * sk_h
    v += b * sv_b + (h // (H // G)) * sv_h
    t = n * BT + tl.arange(0, BT)
    at, code_q = t + S - T, _codes(codes_q, b, t, T)
    f_q = load(q + b * sq_b + h * sq_h, t, T, 0, K, BK, sq_t)
    d_o, total = load(d_out + bh * T * V, t, T, 0, V, BV, V), total_of(lse + bh * T, t, t < T)
    taken = tl.load(lost + bh * T + t, mask=t < T, other=0.0)
    d_most = tl.load(d_top + bh * T + t, mask=t < T, other=0.0)
    best = tl.load(which + bh * T + t, mask=t < T, other=-1)
    d = tl.zeros([BT, BK], tl.float32)
    first = n * BT + S - T
    last = tl.minimum(tl.minimum(first + BT, S) + ahead, S)
    for i in range(tl.maximum(first - width + 1, 0) // BS, (last + BS - 1) // BS):
        s = i * BS + tl.arange(0, BS)
        f_k = load(k, s, S, 0, K, BK, sk_t)
        d_weights = dot(d_o, tl.trans(load(v, s, S, 0, V, BV, sv_t)), DT, PREC)
        scores = _scores(f_q, f_k, at, s, code_q, _codes(codes_k, b, s, S), width, ahead, scale, DT, PREC)
        d += dot(_gradient(scores, total, d_weights, taken, d_most, best, s), f_k, DT, PREC)
    store(d_q + bh * T * K, d * scale, t, T, 0, K, BK)


@triton.jit
def back_k(q, k, v, codes_q, codes_k, lse, which, d_out, lost, d_top, d_k, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b,
           sv_h, sv_t, T, S, H, G, width, ahead, scale, K: tl.constexpr, V: tl.constexpr, DT: tl.constexpr,
           PREC: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Of a block of BT keys, from the queries that may see it, BS at a time."""
    n, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    s = n * BT + tl.arange(0, BT)
    code_k = _codes(codes_k, b, s, S)
    f_k = load(k + b * sk_b + g * sk_h, s, S, 0, K, BK, sk_t)
    f_v = load(v + b * sv_b + g * sv_h, s, S, 0, V, BV, sv_t)
    d = tl.zeros([BT, BK], tl.float32)
    first = tl.maximum(n * BT - ahead - (S - T), 0)
    last = tl.minimum(tl.minimum(n * BT + BT, S) + width - 1 - (S - T), T)
    for r in range(H // G):
        h = g * (H // G) + r
        bh = b * H + h
        for i in range(first // BS, (last + BS - 1) // BS):
            t = i * BS + tl.arange(0, BS)
            f_q = load(q + b * sq_b + h * sq_h, t, T, 0, K, BK, sq_t)
            scores = _scores(f_q, f_k, t + S - T, s, _codes(codes_q, b, t, T), code_k, width, ahead, scale, DT, PREC)
            d_weights = dot(load(d_out + bh * T * V, t, T, 0, V, BV, V), tl.trans(f_v), DT, PREC)
            taken = tl.load(lost + bh * T + t, mask=t < T, other=0.0)
            d_most = tl.load(d_top + bh * T + t, mask=t < T, other=0.0)
            best = tl.load(which + bh * T + t, mask=t < T, other=-1)
            d_scores = _gradient(scores, total_of(lse + bh * T, t, t < T), d_weights, taken, d_most, best, s)
            d += dot(tl.trans(d_scores), f_q, DT, PREC)
    store(d_k + bg * S * K, d * scale, s, S, 0, K, BK)


@triton.jit
def back_v(q, k, v, codes_q, codes_k, lse, d_out, d_v, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, T, S, H,
           G, width, ahead, scale, K: tl.constexpr, V: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
           BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Beside back_k: scores made twice cost less than accumulators that fill the registers."""
    n, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    s = n * BT + tl.arange(0, BT)
    code_k = _codes(codes_k, b, s, S)
    f_k = load(k + b * sk_b + g * sk_h, s, S, 0, K, BK, sk_t)
    d = tl.zeros([BT, BV], tl.float32)
    first = tl.maximum(n * BT - ahead - (S - T), 0)
    last = tl.minimum(tl.minimum(n * BT + BT, S) + width - 1 - (S - T), T)
    for r in range(H // G):
        h = g * (H // G) + r
        bh = b * H + h
        for i in range(first // BS, (last + BS - 1) // BS):
            t = i * BS + tl.arange(0, BS)
            f_q = load(q + b * sq_b + h * sq_h, t, T, 0, K, BK, sq_t)
            scores = _scores(f_q, f_k, t + S - T, s, _codes(codes_q, b, t, T), code_k, width, ahead, scale, DT, PREC)
            weights = tl.exp(scores - total_of(lse + bh * T, t, t < T)[:, None])
            d += dot(tl.trans(weights), load(d_out + bh * T * V, t, T, 0, V, BV, V), DT, PREC)
    store(d_v + bg * S * V, d, s, S, 0, V, BV)
