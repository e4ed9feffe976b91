"""The GPU kernels of `local2d`: softmax of tiles of patches over the tiles that some patch of theirs can see.

Queries go by tiles of TY x TX patches, keys by tiles of UY x UX (for the gradients of keys and values the other way
round); tokens that are no patches stand in blocks of as many, whose programs come first, because they read everything
and so take longest. A tile of keys is read if its rectangle comes nearer than the radius to
the tile's own. Tokens stay where they are: a tile's rows are gathered. A product takes operands of type DT with
precision PREC; scores, weights and sums are float32.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops._triton import dot, total_of

NONE = tl.constexpr(-float("inf"))


@triton.jit
def _tokens(n, text, rows, columns, prefix, others, TY: tl.constexpr, TX: tl.constexpr):
    """(tokens, which are real, their rows, their columns) of tile n, or if `text` of block n of those that are no
    patches."""
    i = tl.arange(0, TY * TX)
    across = (columns + TX - 1) // TX
    y, x, other = (n // across) * TY + i // TX, (n % across) * TX + i % TX, n * (TY * TX) + i
    beside = tl.where(other < prefix, other, other + rows * columns)
    tokens = tl.where(text != 0, beside, prefix + y * columns + x)
    return tokens, tl.where(text != 0, other < others, (y < rows) & (x < columns)), y, x


@triton.jit
def _box(n, rows, columns, TY: tl.constexpr, TX: tl.constexpr):
    """(first row, last row, first column, last column) of tile n."""
    across = (columns + TX - 1) // TX
    y, x = (n // across) * TY, (n % across) * TX
    return y, tl.minimum(y + TY, rows) - 1, x, tl.minimum(x + TX, columns) - 1


@triton.jit
def _around(n, text, rows, columns, radius, TY: tl.constexpr, TX: tl.constexpr, UY: tl.constexpr, UX: tl.constexpr):
    """(first row of tiles, first column of tiles, how many columns, how many tiles) that tile n may see."""
    top, bottom, left, right = _box(n, rows, columns, TY, TX)
    top, left = tl.where(text != 0, 0, tl.maximum(top - radius + 1, 0)), tl.where(text != 0, 0, left - radius + 1)
    left = tl.maximum(left, 0)
    bottom = tl.where(text != 0, rows - 1, tl.minimum(bottom + radius - 1, rows - 1))
    right = tl.where(text != 0, columns - 1, tl.minimum(right + radius - 1, columns - 1))
    wide = right // UX - left // UX + 1
    return top // UY, left // UX, wide, wide * (bottom // UY - top // UY + 1)


@triton.jit
def _apart(n, m, rows, columns, TY: tl.constexpr, TX: tl.constexpr, UY: tl.constexpr, UX: tl.constexpr):
    """The squared distance between the nearest patches of tile n of the one kind and tile m of the other."""
    top, bottom, left, right = _box(n, rows, columns, TY, TX)
    top_m, bottom_m, left_m, right_m = _box(m, rows, columns, UY, UX)
    dy = tl.maximum(tl.maximum(top_m - bottom, top - bottom_m), 0)
    dx = tl.maximum(tl.maximum(left_m - right, left - right_m), 0)
    return dy * dy + dx * dx


@triton.jit
def _seen(i, n, text, first_y, first_x, wide, count, rows, columns, radius, TY: tl.constexpr, TX: tl.constexpr,
          UY: tl.constexpr, UX: tl.constexpr):  # fmt: skip
    """(the i-th tile or block around tile n, 1 if it is text, 1 if they see each other)."""
    other = (i >= count).to(tl.int32)
    across = (columns + UX - 1) // UX
    m = tl.where(other != 0, i - count, (first_y + i // wide) * across + first_x + i % wide)
    near = _apart(n, m, rows, columns, TY, TX, UY, UX) < radius * radius
    return m, other, ((text + other) != 0).to(tl.int32) | near.to(tl.int32)


@triton.jit
def _load(x, tokens, real, size: tl.constexpr, B: tl.constexpr, stride):
    columns = tl.arange(0, B)
    mask = real[:, None] & (columns < size)[None, :]
    return tl.load(x + tokens[:, None].to(tl.int64) * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(x, y, tokens, real, size: tl.constexpr, B: tl.constexpr):
    columns = tl.arange(0, B)
    mask = real[:, None] & (columns < size)[None, :]
    tl.store(x + tokens[:, None].to(tl.int64) * size + columns[None, :], y.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _counts(valid, b, tokens, real, T, VALID: tl.constexpr):
    """Which tokens are keys."""
    if VALID:
        real = real & (tl.load(valid + b * T + tokens, mask=real, other=0) != 0)
    return real


@triton.jit
def _scores(q, k, keys, text, y_q, x_q, y_k, x_k, radius, scale, DT: tl.constexpr, PREC: tl.constexpr):
    """Scores of queries on keys, -inf where they are not seen. text: not 0 where one side is no patches."""
    dy, dx = y_q[:, None] - y_k[None, :], x_q[:, None] - x_k[None, :]
    seen = keys[None, :] & ((dy * dy + dx * dx < radius * radius) | (text != 0))
    return tl.where(seen, dot(q, tl.trans(k), DT, PREC) * scale, NONE)


@triton.jit
def _block(rows, columns, others, TY: tl.constexpr, TX: tl.constexpr):
    """(which tile or block a program has, 1 if it is text)."""
    texts = (others + TY * TX - 1) // (TY * TX)
    n = tl.program_id(0)
    text = (n < texts).to(tl.int32)
    return tl.where(text != 0, n, n - texts), text


@triton.jit
def forward(q, k, v, valid, out, lse, top, which, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, T, H, G, rows,
            columns, radius, prefix, others, scale, K: tl.constexpr, V: tl.constexpr, VALID: tl.constexpr,
            WHICH: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
            UY: tl.constexpr, UX: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """out, log-sum-exp and maximum of each query's scores; WHICH: also the key that has the maximum."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * sk_b + (h // (H // G)) * sk_h
    v += b * sv_b + (h // (H // G)) * sv_h
    n, text = _block(rows, columns, others, TY, TX)
    tokens, real, y, x = _tokens(n, text, rows, columns, prefix, others, TY, TX)
    f_q = _load(q + b * sq_b + h * sq_h, tokens, real, K, BK, sq_t)
    first_y, first_x, wide, count = _around(n, text, rows, columns, radius, TY, TX, UY, UX)
    most, mass = tl.full([TY * TX], NONE, tl.float32), tl.zeros([TY * TX], tl.float32)
    read, best = tl.zeros([TY * TX, BV], tl.float32), tl.full([TY * TX], -1, tl.int32)
    for i in range(count + (others + UY * UX - 1) // (UY * UX)):
        m, other, near = _seen(i, n, text, first_y, first_x, wide, count, rows, columns, radius, TY, TX, UY, UX)
        if near != 0:
            t_k, keys, y_k, x_k = _tokens(m, other, rows, columns, prefix, others, UY, UX)
            f_k, f_v = _load(k, t_k, keys, K, BK, sk_t), _load(v, t_k, keys, V, BV, sv_t)
            keys = _counts(valid, b, t_k, keys, T, VALID)
            scores = _scores(f_q, f_k, keys, text + other, y, x, y_k, x_k, radius, scale, DT, PREC)
            here = tl.max(scores, 1)
            if WHICH:
                found = tl.min(tl.where(scores == here[:, None], t_k[None, :], T), 1)
                best = tl.where(here > most, found, best)
            more = tl.maximum(most, here)
            safe = tl.where(more == NONE, 0.0, more)
            weights, kept = tl.exp(scores - safe[:, None]), tl.exp(most - safe)
            mass = mass * kept + tl.sum(weights, 1)
            read = read * kept[:, None] + dot(weights, f_v, DT, PREC)
            most = more
    filled = tl.where(mass > 0, mass, 1.0)
    _store(out + bh * T * V, read / filled[:, None], tokens, real, V, BV)
    tl.store(lse + bh * T + tokens, tl.where(mass > 0, most + tl.log(filled), NONE), mask=real)
    tl.store(top + bh * T + tokens, most, mask=real)
    if WHICH:
        tl.store(which + bh * T + tokens, best, mask=real)


@triton.jit
def _gradient(weights, d_weights, lost, d_top, best, t_k, WHICH: tl.constexpr):
    """Of the scores. lost: what normalising takes, sum of d out * out - d lse."""
    d = weights * (d_weights - lost[:, None])
    if WHICH:
        d += tl.where(best[:, None] == t_k[None, :], d_top[:, None], 0.0)
    return d


@triton.jit
def back_q(q, k, v, valid, lse, which, d_out, lost, d_top, d_q, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
           T, H, G, rows, columns, radius, prefix, others, scale, K: tl.constexpr, V: tl.constexpr,
           VALID: tl.constexpr, WHICH: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, TY: tl.constexpr,
           TX: tl.constexpr, UY: tl.constexpr, UX: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * sk_b + (h // (H // G)) * sk_h
    v += b * sv_b + (h // (H // G)) * sv_h
    n, text = _block(rows, columns, others, TY, TX)
    tokens, real, y, x = _tokens(n, text, rows, columns, prefix, others, TY, TX)
    f_q = _load(q + b * sq_b + h * sq_h, tokens, real, K, BK, sq_t)
    d_o = _load(d_out + bh * T * V, tokens, real, V, BV, V)
    total = total_of(lse + bh * T, tokens, real)
    taken = tl.load(lost + bh * T + tokens, mask=real, other=0.0)
    d_most, best = taken, tl.full([TY * TX], -1, tl.int32)
    if WHICH:
        d_most = tl.load(d_top + bh * T + tokens, mask=real, other=0.0)
        best = tl.load(which + bh * T + tokens, mask=real, other=-1)
    first_y, first_x, wide, count = _around(n, text, rows, columns, radius, TY, TX, UY, UX)
    d = tl.zeros([TY * TX, BK], tl.float32)
    for i in range(count + (others + UY * UX - 1) // (UY * UX)):
        m, other, near = _seen(i, n, text, first_y, first_x, wide, count, rows, columns, radius, TY, TX, UY, UX)
        if near != 0:
            t_k, keys, y_k, x_k = _tokens(m, other, rows, columns, prefix, others, UY, UX)
            f_k = _load(k, t_k, keys, K, BK, sk_t)
            d_weights = dot(d_o, tl.trans(_load(v, t_k, keys, V, BV, sv_t)), DT, PREC)
            keys = _counts(valid, b, t_k, keys, T, VALID)
            scores = _scores(f_q, f_k, keys, text + other, y, x, y_k, x_k, radius, scale, DT, PREC)
            weights = tl.exp(scores - total[:, None])
            d += dot(_gradient(weights, d_weights, taken, d_most, best, t_k, WHICH), f_k, DT, PREC)
    _store(d_q + bh * T * K, d * scale, tokens, real, K, BK)


@triton.jit
def back_k(q, k, v, valid, lse, which, d_out, lost, d_top, d_k, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t,
           T, H, G, rows, columns, radius, prefix, others, scale, K: tl.constexpr, V: tl.constexpr,
           VALID: tl.constexpr, WHICH: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, TY: tl.constexpr,
           TX: tl.constexpr, UY: tl.constexpr, UX: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Of a tile of keys, from the queries around it: who sees is seen."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    n, text = _block(rows, columns, others, TY, TX)
    t_k, real, y, x = _tokens(n, text, rows, columns, prefix, others, TY, TX)
    f_k = _load(k + b * sk_b + g * sk_h, t_k, real, K, BK, sk_t)
    f_v = _load(v + b * sv_b + g * sv_h, t_k, real, V, BV, sv_t)
    keys = _counts(valid, b, t_k, real, T, VALID)
    first_y, first_x, wide, count = _around(n, text, rows, columns, radius, TY, TX, UY, UX)
    d = tl.zeros([TY * TX, BK], tl.float32)
    for r in range(H // G):
        h = g * (H // G) + r
        bh = b * H + h
        for i in range(count + (others + UY * UX - 1) // (UY * UX)):
            m, other, near = _seen(i, n, text, first_y, first_x, wide, count, rows, columns, radius, TY, TX, UY, UX)
            if near != 0:
                t_q, there, y_q, x_q = _tokens(m, other, rows, columns, prefix, others, UY, UX)
                f_q = _load(q + b * sq_b + h * sq_h, t_q, there, K, BK, sq_t)
                scores = _scores(f_q, f_k, keys, text + other, y_q, x_q, y, x, radius, scale, DT, PREC)
                weights = tl.exp(scores - total_of(lse + bh * T, t_q, there)[:, None])
                d_weights = dot(_load(d_out + bh * T * V, t_q, there, V, BV, V), tl.trans(f_v), DT, PREC)
                taken = tl.load(lost + bh * T + t_q, mask=there, other=0.0)
                d_most, best = taken, tl.full([UY * UX], -1, tl.int32)
                if WHICH:
                    d_most = tl.load(d_top + bh * T + t_q, mask=there, other=0.0)
                    best = tl.load(which + bh * T + t_q, mask=there, other=-1)
                d_scores = _gradient(weights, d_weights, taken, d_most, best, t_k, WHICH)
                d += dot(tl.trans(d_scores), f_q, DT, PREC)
    _store(d_k + bg * T * K, d * scale, t_k, real, K, BK)


@triton.jit
def back_v(q, k, v, valid, lse, d_out, d_v, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, T, H, G, rows,
           columns, radius, prefix, others, scale, K: tl.constexpr, V: tl.constexpr, VALID: tl.constexpr,
           DT: tl.constexpr, PREC: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, UY: tl.constexpr,
           UX: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Beside back_k: scores made twice cost less than accumulators that fill the registers."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    n, text = _block(rows, columns, others, TY, TX)
    t_k, real, y, x = _tokens(n, text, rows, columns, prefix, others, TY, TX)
    f_k = _load(k + b * sk_b + g * sk_h, t_k, real, K, BK, sk_t)
    keys = _counts(valid, b, t_k, real, T, VALID)
    first_y, first_x, wide, count = _around(n, text, rows, columns, radius, TY, TX, UY, UX)
    d = tl.zeros([TY * TX, BV], tl.float32)
    for r in range(H // G):
        h = g * (H // G) + r
        bh = b * H + h
        for i in range(count + (others + UY * UX - 1) // (UY * UX)):
            m, other, near = _seen(i, n, text, first_y, first_x, wide, count, rows, columns, radius, TY, TX, UY, UX)
            if near != 0:
                t_q, there, y_q, x_q = _tokens(m, other, rows, columns, prefix, others, UY, UX)
                f_q = _load(q + b * sq_b + h * sq_h, t_q, there, K, BK, sq_t)
                scores = _scores(f_q, f_k, keys, text + other, y_q, x_q, y, x, radius, scale, DT, PREC)
                weights = tl.exp(scores - total_of(lse + bh * T, t_q, there)[:, None])
                d += dot(tl.trans(weights), _load(d_out + bh * T * V, t_q, there, V, BV, V), DT, PREC)
    _store(d_v + bg * T * V, d, t_k, real, V, BV)
