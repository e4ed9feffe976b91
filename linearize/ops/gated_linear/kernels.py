"""The GPU kernels of `gated_linear`. Sequences are cut into chunks of BT tokens, features into blocks of BF:

    gates     log gates added up from the start of each chunk
    sums      what each chunk adds to the state, all chunks at once
    scan      the state before each chunk (backwards: the gradient of the state behind it)
    forward   numerator and normaliser of each chunk from its state
    back_q, back_k, back_v, back_g    gradients, of the log gates from what the first two write

Within a chunk a weight is sum_f q_tf k_sf exp(what f faded by between s and t). Where no feature of a block fades by
more than exp(-MILD) in a chunk, that is one product, of queries times exp(G) and keys times exp(-G). Elsewhere blocks
of tokens are merged in pairs, 1 + 1, 2 + 2, ... (see torch.py): later queries carry what they faded since their half
began, earlier keys what they will have faded when theirs ends, and round i is one product of which those pairs count
whose t and s first part in bit i. Every exponential is then at most 1. `gates` adds up in float64 and writes two
float32, a sum and what it was rounded by: differences lose no digits, however strong a gate stands between.

The normaliser stands beside the values, in a vector: a column V + 1 would cost a whole tile. NARROW: one gate for all
features. A product takes operands of type DT with precision PREC. State, gates and sums are float32.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops._triton import document, dot, load, masks, store, within

#: nats that a chunk may fade by and still be one product
MILD = tl.constexpr(16.0)


@triton.jit
def _state(s, block, first, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):
    """Pointers and mask of a block of a state [F, V + 1], and those of its normaliser."""
    rows, columns = block + tl.arange(0, BF), first + tl.arange(0, BV)
    place = s + rows * (V + 1)
    return place[:, None] + columns[None, :], within(rows, F, columns, V, BV), place + V, rows < F


@triton.jit
def _read_state(s, block, first, F: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):
    kv, mask, z, real = _state(s, block, first, F, V, BF, BV)
    return tl.load(kv, mask=mask, other=0.0), tl.load(z, mask=real & (first == 0), other=0.0)


@triton.jit
def gates(g, faded, sg_b, sg_h, sg_t, T, J, F: tl.constexpr, NARROW: tl.constexpr, BT: tl.constexpr,
          BF: tl.constexpr):  # fmt: skip
    """faded[0] + faded[1] [B, J, T, F or 1]: log gates from a chunk's first token to each, in two parts."""
    block, bj = tl.program_id(1) * BF, tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    g += (bj // J) * sg_b + (bj % J) * sg_h
    here, rest = faded + bj * T * (1 if NARROW else F), tl.num_programs(2).to(tl.int64) * T * (1 if NARROW else F)
    if NARROW:
        total = tl.cumsum(tl.load(g + t.to(tl.int64) * sg_t, mask=t < T, other=0.0).to(tl.float64), 0)
        high = total.to(tl.float32)
        tl.store(here + t, high, mask=t < T)
        tl.store(here + rest + t, (total - high.to(tl.float64)).to(tl.float32), mask=t < T)
    else:
        total = tl.cumsum(load(g, t, T, block, F, BF, sg_t).to(tl.float64), 0)
        high = total.to(tl.float32)
        store(here, high, t, T, block, F, BF)
        store(here + rest, (total - high.to(tl.float64)).to(tl.float32), t, T, block, F, BF)


@triton.jit
def _faded(faded, parts, t, T, block, F: tl.constexpr, BF: tl.constexpr, NARROW: tl.constexpr):
    """Both parts of what `gates` wrote for tokens t, behind the end as for the last one: [BT, BF], or [BT, 1]."""
    t = tl.minimum(t, T - 1)
    if NARROW:
        place, mask = faded + t[:, None], (t < T)[:, None]
    else:
        columns = block + tl.arange(0, BF)
        place, mask = faded + t[:, None].to(tl.int64) * F + columns[None, :], within(t, T, columns, F, BF)
    return tl.load(place, mask=mask, other=0.0), tl.load(place + parts, mask=mask, other=0.0)


@triton.jit
def _to_end(faded, parts, c, high, low, T, block, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
            NARROW: tl.constexpr):  # fmt: skip
    """(what is left of each token at the end of a chunk, of all before it)."""
    end, rest = _faded(faded, parts, c * BT + BT - 1 + tl.arange(0, 1), T, block, F, BF, NARROW)
    return tl.exp((end - high) + (rest - low)), tl.exp(end)


@triton.jit
def _fade(high, low):
    """exp of what lies between s and t <= s, [BT, BT], of one gate for all features."""
    passed = (high - tl.trans(high)) + (low - tl.trans(low))
    return tl.exp(tl.minimum(passed, 0.0))


@triton.jit
def _rounds(high, ROUNDS: tl.constexpr):
    """(1 where one product will do, else 0; how many rounds there are)."""
    mild = (tl.min(high) > -MILD).to(tl.int32)
    return mild, ROUNDS + mild * (1 - ROUNDS)


@triton.jit
def _round(faded, parts, c, high, low, i, mild, T, block, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """(what later queries, what earlier keys are multiplied by) in round i."""
    t = tl.arange(0, BT)
    middle = tl.minimum(c * BT + ((t >> i) | 1) * (1 << i) - 1, T - 1)  # the last token of the early half
    columns = block + tl.arange(0, BF)
    mask = (mild == 0) & (columns < F)[None, :] & (t >= 0)[:, None]
    place = faded + middle[:, None].to(tl.int64) * F + columns[None, :]
    passed = (high - tl.load(place, mask=mask, other=0.0)) + (low - tl.load(place + parts, mask=mask, other=0.0))
    passed = tl.where((((t >> i) & 1) | mild)[:, None] != 0, passed, -passed)
    return tl.exp(passed), tl.exp(passed * (1 - 2 * mild))


@triton.jit
def _pairs(i, mild, BT: tl.constexpr):
    """Which pairs count in round i."""
    t, s = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    return (t > s) & ((mild != 0) | (((t ^ s) >> i) == 1))


@triton.jit
def _weights(q, k, faded, parts, c, high, low, T, block, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
             NARROW: tl.constexpr, ROUNDS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr):  # fmt: skip
    """What a block of features adds to the weights of a chunk; if NARROW not yet faded."""
    if NARROW:
        weights = dot(q, tl.trans(k), DT, PREC)
    else:
        i = tl.arange(0, BT)
        weights = tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
        mild, rounds = _rounds(high, ROUNDS)
        for r in tl.range(rounds, disable_licm=True):
            late, early = _round(faded, parts, c, high, low, r, mild, T, block, F, BT, BF)
            weights += tl.where(_pairs(r, mild, BT), dot(q * late, tl.trans(k * early), DT, PREC), 0.0)
    return weights


@triton.jit
def sums(x, y, mass, faded, segments, out, sx_b, sx_h, sx_t, sy_b, sy_h, sy_t, T, H, J, R, E, chunks, F: tl.constexpr,
         V: tl.constexpr, NARROW: tl.constexpr, DOCUMENTS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
         BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """out[b, j, chunk] = sum of what is left of x [y, mass]^T: of keys and values, at the chunk's end, or (BACK) of
    queries and gradients, at its start."""
    c, bj = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks: tl.constexpr = (F + BF - 1) // BF
    block, first = (tl.program_id(1) % blocks) * BF, (tl.program_id(1) // blocks) * BV
    b, j = bj // J, bj % J
    t = c * BT + tl.arange(0, BT)
    parts = tl.num_programs(2).to(tl.int64) * T * (1 if NARROW else F)
    faded += bj * T * (1 if NARROW else F)
    _, reads, goes_on = masks(segments, b, c, t, T, DOCUMENTS, BT)
    high, low = _faded(faded, parts, t, T, block, F, BF, NARROW)
    kv, z = tl.zeros([BF, BV], tl.float32), tl.zeros([BF], tl.float32)
    if BACK:
        left = tl.where(reads[:, None], tl.exp(high), 0.0)
        for r in tl.range(R, disable_licm=True):
            h = j * R + r
            f = load(x + b * sx_b + h * sx_h, t, T, block, F, BF, sx_t).to(tl.float32) * left
            d = load(y + b * sy_b + h * sy_h, t, T, first, V, BV, sy_t)
            m = tl.load(mass + (b * H + h) * T + t, mask=t < T, other=0.0)
            kv += dot(tl.trans(f), d, DT, PREC)
            z += tl.sum(f * m[:, None], 0)
    else:
        left, _all = _to_end(faded, parts, c, high, low, T, block, F, BT, BF, NARROW)
        left = tl.where(goes_on[:, None], left, 0.0)
        f = load(x + b * sx_b + j * sx_h, t, T, block, F, BF, sx_t).to(tl.float32) * left
        kv += dot(tl.trans(f), load(y + b * sy_b + (j // E) * sy_h, t, T, first, V, BV, sy_t), DT, PREC)
        z += tl.sum(f, 0)
    place, mask, z_place, real = _state(out + (bj * chunks + c) * F * (V + 1), block, first, F, V, BF, BV)
    tl.store(place, kv, mask=mask)
    tl.store(z_place, z, mask=real & (first == 0))


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0: what a gate near 1 takes away is not rounded as 1 is."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1)


@triton.jit
def scan(added, faded, first, segments, before, last, T, J, chunks, F: tl.constexpr, V: tl.constexpr,
         NARROW: tl.constexpr, DOCUMENTS: tl.constexpr, GIVEN: tl.constexpr, BACK: tl.constexpr, BT: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """before[chunk] = the state that reaches it, from `first`; last = the one that leaves. BACK: from the end."""
    size: tl.constexpr = F * (V + 1)
    bj, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, real = bj // J, at < size
    state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        state = tl.load(first + bj * size + at, mask=real, other=0.0)
    for i in range(chunks):
        c = chunks - 1 - i if BACK else i
        here = (bj * chunks + c) * size + at
        more = tl.load(added + here, mask=real, other=0.0)
        tl.store(before + here, state, mask=real)
        end = bj * T + tl.minimum(c * BT + BT, T) - 1
        if NARROW:
            passed = tl.load(faded + end)
        else:
            passed = tl.load(faded + end * F + at // (V + 1), mask=real, other=0.0)
        state += _expm1(passed) * state
        if DOCUMENTS:
            lives = document(segments, b, c * BT - 1, T) == document(segments, b, c * BT + BT - 1, T)
            state = state * lives.to(tl.float32)
        state += more
    tl.store(last + bj * size + at, state, mask=real)


@triton.jit
def forward(q, k, v, faded, segments, states, num, mass, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, T, H,
            J, R, E, chunks, F: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr, DOCUMENTS: tl.constexpr,
            ROUNDS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
            BV: tl.constexpr):  # fmt: skip
    c, first, bh = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    j = h // R
    t = c * BT + tl.arange(0, BT)
    parts = (tl.num_programs(2) // R).to(tl.int64) * T * (1 if NARROW else F)
    faded += (b * J + j) * T * (1 if NARROW else F)
    weights = tl.zeros([BT, BT], tl.float32)
    out, total = tl.zeros([BT, BV], tl.float32), tl.zeros([BT], tl.float32)
    for block in tl.range(0, F, BF, disable_licm=True):
        high, low = _faded(faded, parts, t, T, block, F, BF, NARROW)
        f_q = load(q + b * sq_b + h * sq_h, t, T, block, F, BF, sq_t).to(tl.float32)
        f_k = load(k + b * sk_b + j * sk_h, t, T, block, F, BF, sk_t).to(tl.float32)
        weights += _weights(f_q, f_k, faded, parts, c, high, low, T, block, F, BT, BF, NARROW, ROUNDS, DT, PREC)
        kv, z = _read_state(states + ((b * J + j) * chunks + c) * F * (V + 1), block, first, F, V, BF, BV)
        f_q *= tl.exp(high)
        out += dot(f_q, kv, DT, PREC)
        total += tl.sum(f_q * z[None, :], 1)
    sees, reads, _ = masks(segments, b, c, t, T, DOCUMENTS, BT)
    if NARROW:
        high, low = _faded(faded, parts, t, T, 0, F, BF, NARROW)
        weights *= _fade(high, low)
    weights = tl.where(sees, weights, 0.0)
    out, total = tl.where(reads[:, None], out, 0.0), tl.where(reads, total, 0.0)
    out += dot(weights, load(v + b * sv_b + (j // E) * sv_h, t, T, first, V, BV, sv_t), DT, PREC)
    total += tl.sum(weights, 1)
    store(num + bh * T * V, out, t, T, first, V, BV)
    tl.store(mass + bh * T + t, total, mask=(t < T) & (first == 0))


@triton.jit
def back_q(q, k, v, faded, segments, states, d_num, d_mass, d_q, passed, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b,
           sv_h, sv_t, T, H, J, R, E, chunks, F: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr,
           DOCUMENTS: tl.constexpr, ROUNDS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr,
           BF: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """d q, and passed = q d q but for a token on itself: see back_g."""
    c, block, bh = tl.program_id(0), tl.program_id(1) * BF, tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    j = h // R
    i = tl.arange(0, BT)
    t = c * BT + i
    v += b * sv_b + (j // E) * sv_h
    states += ((b * J + j) * chunks + c) * F * (V + 1)
    parts = (tl.num_programs(2) // R).to(tl.int64) * T * (1 if NARROW else F)
    faded += (b * J + j) * T * (1 if NARROW else F)
    sees, reads, _ = masks(segments, b, c, t, T, DOCUMENTS, BT)
    d_m = tl.load(d_mass + bh * T + t, mask=t < T, other=0.0)
    d_w, d = tl.zeros([BT, BT], tl.float32) + d_m[:, None], tl.zeros([BT, BF], tl.float32)
    for first in tl.range(0, V, BV, disable_licm=True):
        d_n = load(d_num + bh * T * V, t, T, first, V, BV, V)
        kv, z = _read_state(states, block, first, F, V, BF, BV)
        d_w += dot(d_n, tl.trans(load(v, t, T, first, V, BV, sv_t)), DT, PREC)
        d += dot(d_n, tl.trans(kv), DT, PREC) + d_m[:, None] * z[None, :]
    d_w = tl.where(sees, d_w, 0.0)
    high, low = _faded(faded, parts, t, T, block, F, BF, NARROW)
    d = tl.where(reads[:, None], d * tl.exp(high), 0.0)
    f_k = load(k + b * sk_b + j * sk_h, t, T, block, F, BF, sk_t).to(tl.float32)
    own = tl.sum(tl.where(i[:, None] == i[None, :], d_w, 0.0), 1)[:, None] * f_k
    if NARROW:
        d += dot(tl.where(i[:, None] > i[None, :], d_w * _fade(high, low), 0.0), f_k, DT, PREC)
    else:
        mild, rounds = _rounds(high, ROUNDS)
        for n in tl.range(rounds, disable_licm=True):
            late, early = _round(faded, parts, c, high, low, n, mild, T, block, F, BT, BF)
            d += dot(tl.where(_pairs(n, mild, BT), d_w, 0.0), f_k * early, DT, PREC) * late
    d_own = load(q + b * sq_b + h * sq_h, t, T, block, F, BF, sq_t).to(tl.float32) * d
    store(d_q + bh * T * F, d + own, t, T, block, F, BF)
    if NARROW:
        tl.store(passed + (tl.program_id(1) * tl.num_programs(2) + bh) * T + t, tl.sum(d_own, 1), mask=t < T)
    else:
        store(passed + bh * T * F, d_own, t, T, block, F, BF)


@triton.jit
def back_k(q, k, v, faded, segments, states, d_states, d_num, d_mass, d_k, passed, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t,
           sv_b, sv_h, sv_t, T, H, J, R, E, chunks, F: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr,
           DOCUMENTS: tl.constexpr, ROUNDS: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr,
           BF: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """d k, and passed = -k d k but for a token on itself, with all that goes into the next chunk at the last token."""
    c, block, bj = tl.program_id(0), tl.program_id(1) * BF, tl.program_id(2).to(tl.int64)
    b, j = bj // J, bj % J
    i = tl.arange(0, BT)
    t = c * BT + i
    v += b * sv_b + (j // E) * sv_h
    states += (bj * chunks + c) * F * (V + 1)
    d_states += (bj * chunks + c) * F * (V + 1)
    parts = tl.num_programs(2).to(tl.int64) * T * (1 if NARROW else F)
    faded += bj * T * (1 if NARROW else F)
    sees, _, goes_on = masks(segments, b, c, t, T, DOCUMENTS, BT)
    high, low = _faded(faded, parts, t, T, block, F, BF, NARROW)
    d, crossing = tl.zeros([BT, BF], tl.float32), tl.zeros([BF], tl.float32)
    for first in tl.range(0, V, BV, disable_licm=True):
        d_kv, d_z = _read_state(d_states, block, first, F, V, BF, BV)
        kv, z = _read_state(states, block, first, F, V, BF, BV)
        d += dot(load(v, t, T, first, V, BV, sv_t), tl.trans(d_kv), DT, PREC) + d_z[None, :]
        crossing += tl.sum(kv * d_kv, 1) + z * d_z
    left, left_of_all = _to_end(faded, parts, c, high, low, T, block, F, BT, BF, NARROW)
    d = tl.where(goes_on[:, None], d * left, 0.0)
    crossing = crossing * tl.sum(left_of_all, 0)
    if DOCUMENTS:
        lives = document(segments, b, c * BT - 1, T) == document(segments, b, c * BT + BT - 1, T)
        crossing = tl.where(lives, crossing, 0.0)
    crossing += tl.sum(load(k + b * sk_b + j * sk_h, t, T, block, F, BF, sk_t).to(tl.float32) * d, 0)
    own = tl.zeros([BT, BF], tl.float32)
    for r in tl.range(R, disable_licm=True):
        h = j * R + r
        d_m = tl.load(d_mass + (b * H + h) * T + t, mask=t < T, other=0.0)
        d_w = tl.zeros([BT, BT], tl.float32) + d_m[:, None]
        for first in tl.range(0, V, BV, disable_licm=True):
            d_n = load(d_num + (b * H + h) * T * V, t, T, first, V, BV, V)
            d_w += dot(d_n, tl.trans(load(v, t, T, first, V, BV, sv_t)), DT, PREC)
        d_w = tl.where(sees, d_w, 0.0)
        f_q = load(q + b * sq_b + h * sq_h, t, T, block, F, BF, sq_t).to(tl.float32)
        own += tl.sum(tl.where(i[:, None] == i[None, :], d_w, 0.0), 1)[:, None] * f_q
        if NARROW:
            d += dot(tl.trans(tl.where(i[:, None] > i[None, :], d_w * _fade(high, low), 0.0)), f_q, DT, PREC)
        else:
            mild, rounds = _rounds(high, ROUNDS)
            for n in tl.range(rounds, disable_licm=True):
                late, early = _round(faded, parts, c, high, low, n, mild, T, block, F, BT, BF)
                d += dot(tl.trans(tl.where(_pairs(n, mild, BT), d_w, 0.0)), f_q * late, DT, PREC) * early
    store(d_k + bj * T * F, d + own, t, T, block, F, BF)
    d_own = -load(k + b * sk_b + j * sk_h, t, T, block, F, BF, sk_t).to(tl.float32) * d
    d_own += tl.where((t == tl.minimum(c * BT + BT, T) - 1)[:, None], crossing[None, :], 0.0)
    if NARROW:
        tl.store(passed + (tl.program_id(1) * tl.num_programs(2) + bj) * T + t, tl.sum(d_own, 1), mask=t < T)
    else:
        store(passed + bj * T * F, d_own, t, T, block, F, BF)


@triton.jit
def back_g(of_q, of_k, d_g, T, R, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """d gates. What passes the gate of token u is in a query at or after u, but in no key at or after u: d g_u is the
    sum over the chunk's tokens from u on of q d q - k d k, and of all that goes on into the next chunk. F: gates."""
    block, bj = tl.program_id(1) * BF, tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    d = load(of_k + bj * T * F, t, T, block, F, BF, F)
    for r in tl.range(R, disable_licm=True):
        d += load(of_q + (bj * R + r) * T * F, t, T, block, F, BF, F)
    store(d_g + bj * T * F, tl.cumsum(d, 0, reverse=True), t, T, block, F, BF)


@triton.jit
def back_v(q, k, faded, segments, d_states, d_num, d_v, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, T, H, J, R, E, chunks,
           F: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr, DOCUMENTS: tl.constexpr, ROUNDS: tl.constexpr,
           DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    c, first, bj = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    b, j = bj // J, bj % J
    t = c * BT + tl.arange(0, BT)
    k += b * sk_b + j * sk_h
    parts = tl.num_programs(2).to(tl.int64) * T * (1 if NARROW else F)
    faded += bj * T * (1 if NARROW else F)
    sees, _, goes_on = masks(segments, b, c, t, T, DOCUMENTS, BT)
    d_values = tl.zeros([BT, BV], tl.float32)
    for block in tl.range(0, F, BF, disable_licm=True):
        high, low = _faded(faded, parts, t, T, block, F, BF, NARROW)
        left, _all = _to_end(faded, parts, c, high, low, T, block, F, BT, BF, NARROW)
        f_k = load(k, t, T, block, F, BF, sk_t).to(tl.float32) * left
        d_kv, _z = _read_state(d_states + (bj * chunks + c) * F * (V + 1), block, first, F, V, BF, BV)
        d_values += dot(f_k, d_kv, DT, PREC)
    d_values = tl.where(goes_on[:, None], d_values, 0.0)
    for r in tl.range(R, disable_licm=True):
        h = j * R + r
        weights = tl.zeros([BT, BT], tl.float32)
        for block in tl.range(0, F, BF, disable_licm=True):
            high, low = _faded(faded, parts, t, T, block, F, BF, NARROW)
            f_q = load(q + b * sq_b + h * sq_h, t, T, block, F, BF, sq_t).to(tl.float32)
            f_k = load(k, t, T, block, F, BF, sk_t).to(tl.float32)
            weights += _weights(f_q, f_k, faded, parts, c, high, low, T, block, F, BT, BF, NARROW, ROUNDS, DT, PREC)
        if NARROW:
            high, low = _faded(faded, parts, t, T, 0, F, BF, NARROW)
            weights *= _fade(high, low)
        weights = tl.where(sees, weights, 0.0)
        d_n = load(d_num + (b * H + h) * T * V, t, T, first, V, BV, V)
        d_values += dot(tl.trans(weights), d_n, DT, PREC)
    store(d_v + bj * T * V, d_values, t, T, first, V, BV)


@triton.jit
def step(q, k, v, g, states, new, num, mass, sq_b, sq_h, sk_b, sk_h, sv_b, sv_h, sg_b, sg_h, H, J, R, E,
         F: tl.constexpr, V: tl.constexpr, NARROW: tl.constexpr, GIVEN: tl.constexpr, BF: tl.constexpr,
         BV: tl.constexpr):  # fmt: skip
    """One token: the state is read once and written once, BV of its columns by each program. BF: all features."""
    first, bj = tl.program_id(0) * BV, tl.program_id(1).to(tl.int64)
    b, j = bj // J, bj % J
    one, rows, columns = tl.arange(0, 1), tl.arange(0, BF), first + tl.arange(0, BV)
    place, mask, z_place, real = _state(bj * F * (V + 1) + states, 0, first, F, V, BF, BV)
    f_k = tl.load(k + b * sk_b + j * sk_h + rows, mask=real, other=0.0).to(tl.float32)
    values = tl.load(v + b * sv_b + (j // E) * sv_h + columns, mask=columns < V, other=0.0).to(tl.float32)
    kv, z = f_k[:, None] * values[None, :], f_k
    if GIVEN:
        if NARROW:
            taken = _expm1(tl.load(g + b * sg_b + j * sg_h).to(tl.float32)) + tl.zeros([BF], tl.float32)
        else:
            taken = _expm1(tl.load(g + b * sg_b + j * sg_h + rows, mask=real, other=0.0).to(tl.float32))
        old, old_z = tl.load(place, mask=mask, other=0.0), tl.load(z_place, mask=real, other=0.0)
        kv, z = old + taken[:, None] * old + kv, old_z + taken * old_z + z
    place, mask, z_place, real = _state(bj * F * (V + 1) + new, 0, first, F, V, BF, BV)
    tl.store(place, kv, mask=mask)
    tl.store(z_place, z, mask=real & (first == 0))
    for r in range(R):
        h = j * R + r
        f_q = tl.load(q + b * sq_b + h * sq_h + rows, mask=rows < F, other=0.0).to(tl.float32)
        tl.store(num + (b * H + h) * V + columns, tl.sum(f_q[:, None] * kv, 0), mask=columns < V)
        total = tl.sum(f_q * z, 0) + tl.zeros([1], tl.float32)
        tl.store(mass + b * H + h + one, total, mask=(one == 0) & (first == 0))
