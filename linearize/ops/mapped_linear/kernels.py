"""The GPU kernels of `mapped_linear`. Sequences are cut into chunks of BT tokens:

    sums      what each chunk adds to the state, all chunks at once
    scan      the state before each chunk (backwards: the gradient of the state behind it)
    forward   output and mass of each chunk from its state
    back_q    d u_q of u_q = q W_q + b_q, from the state before the chunk
    back_k    d u_k, from the gradient of the state behind it
    back_v    d v, from the same

Features live in registers, one half [BT, BC] at a time where the map has two (the second is the first of -u): registers
are what is scarce, so that u is made for each half anew. K, C and V are padded to BK, BC and BV. V is cut into blocks;
d u is linear in what they add, and the backward kernels write a part for each. A product takes operands of type DT.
Maps of 16-bit inputs take their weight as a sum of two such (SPLIT), which is exact to 16 bits and more. State and sums
are float32.
"""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops._triton import document, dot, load, masks, store, within

LEAST = tl.constexpr(1e-12)
SPLIT_SOFTMAX, EXP, JOINT_SOFTMAX, RELU, ELU = (tl.constexpr(i) for i in range(5))


@triton.jit
def _phi(u, sign, C: tl.constexpr, MAP: tl.constexpr, BC: tl.constexpr):
    """One half of the features (sign 1 or -1), 0 in columns that are padding."""
    real = (tl.arange(0, BC) < C)[None, :]
    if MAP == RELU:
        f = tl.maximum(u, 0.0)
    elif MAP == ELU:
        f = tl.where(u > 0, u + 1, tl.exp(tl.minimum(u, 0.0)))
    elif MAP == JOINT_SOFTMAX:
        x = 2 * sign * u
        top = tl.max(tl.where(real, tl.abs(x), 0.0), 1)[:, None]
        f = tl.where(real, tl.exp(x - top), 0.0)
        f = f / (tl.sum(f, 1) + tl.sum(tl.where(real, tl.exp(-x - top), 0.0), 1))[:, None]
    else:
        x = tl.where(real, sign * u, -float("inf"))
        f = tl.exp(x - tl.max(x, 1)[:, None])
        if MAP == SPLIT_SOFTMAX:
            f = f / tl.sum(f, 1)[:, None]
        f = tl.maximum(f, LEAST)
    return tl.where(real, f, 0.0)


@triton.jit
def _phi_back(f, d, sign, MAP: tl.constexpr):
    """What one half adds to d u, but for the part of joint softmax that needs both; see ops/_maps.py."""
    if MAP == RELU:
        d_u = tl.where(f > 0, d, 0.0)
    elif MAP == ELU:
        d_u = d * tl.minimum(f, 1.0)
    else:
        d_u = f * d
        if MAP == SPLIT_SOFTMAX:
            d_u -= f * tl.sum(d_u, 1)[:, None]
        if MAP == EXP:
            extreme = (f == 1).to(tl.float32)
            d_u -= extreme * (tl.sum(d_u, 1) / tl.maximum(tl.sum(extreme, 1), 1.0))[:, None]
        d_u = sign * d_u
    return d_u


@triton.jit
def _state(s, half, first, C: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr):
    """Pointers and mask of columns first... of one half of a state [F, V + 1], and those of its normaliser."""
    rows, columns = tl.arange(0, BC), first + tl.arange(0, BV)
    place = s + (half * C + rows) * (V + 1)
    return place[:, None] + columns[None, :], within(rows, C, columns, V, BV), place + V, rows < C


@triton.jit
def _read_state(s, half, first, C: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr):
    kv, inside, z, real = _state(s, half, first, C, V, BC, BV)
    return tl.load(kv, mask=inside, other=0.0), tl.load(z, mask=real, other=0.0)


@triton.jit
def _write_state(s, half, first, kv, z, C: tl.constexpr, V: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr):
    place, inside, z_place, real = _state(s, half, first, C, V, BC, BV)
    tl.store(place, kv, mask=inside)
    tl.store(z_place, z, mask=real & (first == 0))


@triton.jit
def _features(x, w, bias, head, heads, sign, t, T, K: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
              MAPPED: tl.constexpr, BIASED: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr,
              BK: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One half of Phi(x W + b) in DT, 0 behind the end. w [1 or 2, heads, K, C]: the parts whose sum W is."""
    rows, columns = tl.arange(0, BK), tl.arange(0, BC)
    if MAPPED:
        inside = within(rows, K, columns, C, BC)
        place = w + head * K * C + rows[:, None] * C + columns[None, :]
        u = tl.dot(x, tl.load(place, mask=inside, other=0.0).to(x.dtype), input_precision=PREC)
        if SPLIT:
            u += tl.dot(x, tl.load(place + heads * K * C, mask=inside, other=0.0).to(x.dtype))
    else:
        u = x.to(tl.float32)
    if BIASED:
        u += tl.load(bias + head * C + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    return tl.where((t < T)[:, None], _phi(u, sign, C, MAP, BC), 0.0).to(DT)


@triton.jit
def _counts(valid, b, t, T, VALID: tl.constexpr):
    """Which tokens are keys."""
    counts = t < T
    if VALID:
        counts = counts & (tl.load(valid + b * T + t, mask=t < T, other=0) != 0)
    return counts


@triton.jit
def sums(x, y, mass, valid, segments, w, bias, out, sx_b, sx_h, sx_t, sy_b, sy_h, sy_t, T, H, J, R, E, chunks, eps,
         K: tl.constexpr, C: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr,
         MAPPED: tl.constexpr, BIASED: tl.constexpr, VALID: tl.constexpr, DOCUMENTS: tl.constexpr,
         SPLIT: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
         BC: tl.constexpr, BV: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """out[b, j, chunk] = sum of phi(x) [y, mass]^T: of keys and values, or (BACK) of queries and gradients."""
    c, bj = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, half = (tl.program_id(1) // HALVES) * BV, tl.program_id(1) % HALVES
    b, j, sign = bj // J, bj % J, 1.0 - 2.0 * half
    t = c * BT + tl.arange(0, BT)
    _, reads, goes_on = masks(segments, b, c, t, T, DOCUMENTS, BT)
    kv, z = tl.zeros([BC, BV], tl.float32), tl.zeros([BC], tl.float32)
    if BACK:
        for r in tl.range(R, disable_licm=True):
            h = j * R + r
            q = load(x + b * sx_b + h * sx_h, t, T, 0, K, BK, sx_t)
            f = _features(q, w, bias, h, H, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                          BC)  # fmt: skip
            f = tl.where(reads[:, None], f, 0.0).to(DT)
            d = load(y + b * sy_b + h * sy_h, t, T, first, V, BV, sy_t)
            m = tl.load(mass + (b * H + h) * T + t, mask=t < T, other=0.0)
            kv += dot(tl.trans(f), d, DT, PREC)
            z += tl.sum(f.to(tl.float32) * m[:, None], 0)
    else:
        k = load(x + b * sx_b + (j // E) * sx_h, t, T, 0, K, BK, sx_t)
        f = _features(k, w, bias, j, J, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                      BC)  # fmt: skip
        f = tl.where((goes_on & _counts(valid, b, t, T, VALID))[:, None], f, 0.0).to(DT)
        kv += dot(tl.trans(f), load(y + b * sy_b + (j // E) * sy_h, t, T, first, V, BV, sy_t), DT, PREC)
        z += tl.sum(f.to(tl.float32), 0)
    _write_state(out + (bj * chunks + c) * HALVES * C * (V + 1), half, first, kv, z, C, V, BC, BV)


@triton.jit
def scan(added, first, segments, before, last, T, J, size, chunks, DOCUMENTS: tl.constexpr, GIVEN: tl.constexpr,
         BACK: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """before[chunk] = the state that reaches it, from `first`; last = the one that leaves. BACK: from the end."""
    bj, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, inside = bj // J, at < size
    state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        state = tl.load(first + bj * size + at, mask=inside, other=0.0)
    for i in range(chunks):
        c = chunks - 1 - i if BACK else i
        here = (bj * chunks + c) * size + at
        more = tl.load(added + here, mask=inside, other=0.0)
        tl.store(before + here, state, mask=inside)
        if DOCUMENTS:
            lives = document(segments, b, c * BT - 1, T) == document(segments, b, c * BT + BT - 1, T)
            state = state * lives.to(tl.float32)
        state += more
    tl.store(last + bj * size + at, state, mask=inside)


@triton.jit
def forward(q, k, v, w_q, w_k, b_q, b_k, valid, segments, states, out, mass, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b,
            sv_h, sv_t, T, H, J, R, E, chunks, eps, K: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
            MAP: tl.constexpr, HALVES: tl.constexpr, MAPPED: tl.constexpr, BIASED: tl.constexpr, VALID: tl.constexpr,
            DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr,
            BK: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    c, first, bh = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    j = h // R
    t = c * BT + tl.arange(0, BT)
    q += b * sq_b + h * sq_h
    k += b * sk_b + (j // E) * sk_h
    states += ((b * J + j) * chunks + c) * HALVES * C * (V + 1)
    scores = tl.zeros([BT, BT], tl.float32)
    num, total = tl.zeros([BT, BV], tl.float32), tl.zeros([BT], tl.float32)
    for half in tl.range(HALVES, disable_licm=True):
        sign = 1.0 - 2.0 * half
        f_q = load(q, t, T, 0, K, BK, sq_t)
        f_q = _features(f_q, w_q, b_q, h, H, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                        BC)  # fmt: skip
        kv, z = _read_state(states, half, first, C, V, BC, BV)
        num += dot(f_q, kv, DT, PREC)
        total += tl.sum(f_q.to(tl.float32) * z[None, :], 1)
        f_k = load(k, t, T, 0, K, BK, sk_t)
        f_k = _features(f_k, w_k, b_k, j, J, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                        BC)  # fmt: skip
        scores += dot(f_q, tl.trans(f_k), DT, PREC)
    sees, reads, _ = masks(segments, b, c, t, T, DOCUMENTS, BT)
    scores = tl.where(sees & _counts(valid, b, t, T, VALID)[None, :], scores, 0.0)
    num, total = tl.where(reads[:, None], num, 0.0), tl.where(reads, total, 0.0)
    num += dot(scores, load(v + b * sv_b + (j // E) * sv_h, t, T, first, V, BV, sv_t), DT, PREC)
    total += tl.sum(scores, 1)
    store(out + bh * T * V, num / (total + eps)[:, None], t, T, first, V, BV)
    tl.store(mass + bh * T + t, total, mask=(t < T) & (first == 0))


@triton.jit
def back_q(q, k, v, w_q, w_k, b_q, b_k, valid, segments, states, d_num, d_mass, d_u, sq_b, sq_h, sq_t, sk_b, sk_h,
           sk_t, sv_b, sv_h, sv_t, T, H, J, R, E, chunks, eps, K: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
           MAP: tl.constexpr, HALVES: tl.constexpr, MAPPED: tl.constexpr, BIASED: tl.constexpr, VALID: tl.constexpr,
           DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr,
           BK: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    c, block, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, b, h = block * BV, bh // H, bh % H
    j = h // R
    t = c * BT + tl.arange(0, BT)
    q += b * sq_b + h * sq_h
    k += b * sk_b + (j // E) * sk_h
    states += ((b * J + j) * chunks + c) * HALVES * C * (V + 1)
    sees, reads, _ = masks(segments, b, c, t, T, DOCUMENTS, BT)
    d_n = load(d_num + bh * T * V, t, T, first, V, BV, V)
    d_m = tl.load(d_mass + bh * T + t, mask=(t < T) & (first == 0), other=0.0)  # the mass is the first block's
    values = load(v + b * sv_b + (j // E) * sv_h, t, T, first, V, BV, sv_t)
    d_scores = dot(d_n, tl.trans(values), DT, PREC) + d_m[:, None]
    d_scores = tl.where(sees & _counts(valid, b, t, T, VALID)[None, :], d_scores, 0.0).to(DT)
    d_n, d_m = tl.where(reads[:, None], d_n, 0.0).to(d_n.dtype), tl.where(reads, d_m, 0.0)
    d, both, mass = tl.zeros([BT, BC], tl.float32), tl.zeros([BT, BC], tl.float32), tl.zeros([BT], tl.float32)
    for half in tl.range(HALVES, disable_licm=True):
        sign = 1.0 - 2.0 * half
        kv, z = _read_state(states, half, first, C, V, BC, BV)
        d_f = dot(d_n, tl.trans(kv), DT, PREC) + d_m[:, None] * z[None, :]
        f_k = load(k, t, T, 0, K, BK, sk_t)
        f_k = _features(f_k, w_k, b_k, j, J, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                        BC)  # fmt: skip
        d_f += dot(d_scores, f_k, DT, PREC)
        f_q = load(q, t, T, 0, K, BK, sq_t)
        f_q = _features(f_q, w_q, b_q, h, H, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                        BC)  # fmt: skip
        f_q = f_q.to(tl.float32)
        d += _phi_back(f_q, d_f, sign, MAP)
        if MAP == JOINT_SOFTMAX:
            both += sign * f_q
            mass += tl.sum(f_q * d_f, 1)
    if MAP == JOINT_SOFTMAX:
        d = 2 * (d - both * mass[:, None])
    store(d_u + (block * tl.num_programs(2) + bh) * T * C, d, t, T, 0, C, BC)


@triton.jit
def back_k(q, k, v, w_q, w_k, b_q, b_k, valid, segments, states, d_num, d_mass, d_u, sq_b, sq_h, sq_t, sk_b, sk_h,
           sk_t, sv_b, sv_h, sv_t, T, H, J, R, E, chunks, eps, K: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
           MAP: tl.constexpr, HALVES: tl.constexpr, MAPPED: tl.constexpr, BIASED: tl.constexpr, VALID: tl.constexpr,
           DOCUMENTS: tl.constexpr, SPLIT: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr,
           BK: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    c, block, bj = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, b, j = block * BV, bj // J, bj % J
    t = c * BT + tl.arange(0, BT)
    k += b * sk_b + (j // E) * sk_h
    states += (bj * chunks + c) * HALVES * C * (V + 1)
    sees, _, goes_on = masks(segments, b, c, t, T, DOCUMENTS, BT)
    counts = _counts(valid, b, t, T, VALID)
    sees, goes_on = sees & counts[None, :], (goes_on & counts)[:, None]
    v += b * sv_b + (j // E) * sv_h
    d, both, mass = tl.zeros([BT, BC], tl.float32), tl.zeros([BT, BC], tl.float32), tl.zeros([BT], tl.float32)
    for half in tl.range(HALVES, disable_licm=True):
        sign = 1.0 - 2.0 * half
        kv, z = _read_state(states, half, first, C, V, BC, BV)
        d_f = dot(load(v, t, T, first, V, BV, sv_t), tl.trans(kv), DT, PREC)
        d_f = tl.where(goes_on, d_f + tl.where(first == 0, z[None, :], 0.0), 0.0)
        for r in tl.range(R, disable_licm=True):
            h = j * R + r
            bh = b * H + h
            d_n = load(d_num + bh * T * V, t, T, first, V, BV, V)
            d_m = tl.load(d_mass + bh * T + t, mask=(t < T) & (first == 0), other=0.0)
            d_scores = dot(d_n, tl.trans(load(v, t, T, first, V, BV, sv_t)), DT, PREC) + d_m[:, None]
            d_scores = tl.trans(tl.where(sees, d_scores, 0.0).to(DT))
            f_q = load(q + b * sq_b + h * sq_h, t, T, 0, K, BK, sq_t)
            f_q = _features(f_q, w_q, b_q, h, H, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                            BC)  # fmt: skip
            d_f += dot(d_scores, f_q, DT, PREC)
        f_k = load(k, t, T, 0, K, BK, sk_t)
        f_k = _features(f_k, w_k, b_k, j, J, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                        BC)  # fmt: skip
        f_k = f_k.to(tl.float32)
        d += _phi_back(f_k, d_f, sign, MAP)
        if MAP == JOINT_SOFTMAX:
            both += sign * f_k
            mass += tl.sum(f_k * d_f, 1)
    if MAP == JOINT_SOFTMAX:
        d = 2 * (d - both * mass[:, None])
    d = tl.where(counts[:, None], d, 0.0)
    store(d_u + (block * tl.num_programs(2) + bj) * T * C, d, t, T, 0, C, BC)


@triton.jit
def back_v(q, k, w_q, w_k, b_q, b_k, valid, segments, states, d_num, d_v, sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, T, H, J,
           R, E, chunks, K: tl.constexpr, C: tl.constexpr, V: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr,
           MAPPED: tl.constexpr, BIASED: tl.constexpr, VALID: tl.constexpr, DOCUMENTS: tl.constexpr,
           SPLIT: tl.constexpr, DT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
           BC: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    c, first, bj = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    b, j = bj // J, bj % J
    t = c * BT + tl.arange(0, BT)
    k += b * sk_b + (j // E) * sk_h
    states += (bj * chunks + c) * HALVES * C * (V + 1)
    sees, _, goes_on = masks(segments, b, c, t, T, DOCUMENTS, BT)
    counts = _counts(valid, b, t, T, VALID)
    sees, goes_on = sees & counts[None, :], (goes_on & counts)[:, None]
    d_values = tl.zeros([BT, BV], tl.float32)
    for half in tl.range(HALVES, disable_licm=True):
        sign = 1.0 - 2.0 * half
        f_k = load(k, t, T, 0, K, BK, sk_t)
        f_k = _features(f_k, w_k, b_k, j, J, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                        BC)  # fmt: skip
        kv, _z = _read_state(states, half, first, C, V, BC, BV)
        d_values += tl.where(goes_on, dot(f_k, kv, DT, PREC), 0.0)
        for r in tl.range(R, disable_licm=True):
            h = j * R + r
            f_q = load(q + b * sq_b + h * sq_h, t, T, 0, K, BK, sq_t)
            f_q = _features(f_q, w_q, b_q, h, H, sign, t, T, K, C, MAP, MAPPED, BIASED, SPLIT, DT, PREC, BK,
                            BC)  # fmt: skip
            scores = tl.where(sees, dot(f_q, tl.trans(f_k), DT, PREC), 0.0).to(DT)
            d_n = load(d_num + (b * H + h) * T * V, t, T, first, V, BV, V)
            d_values += dot(tl.trans(scores), d_n, DT, PREC)
    store(d_v + bj * T * V, d_values, t, T, first, V, BV)


@triton.jit
def step(q, k, v, w_q, w_k, b_q, b_k, valid, states, new, out, mass, sq_b, sq_h, sk_b, sk_h, sv_b, sv_h, H, J, R, E,
         K: tl.constexpr, C: tl.constexpr, V: tl.constexpr, eps, MAP: tl.constexpr, HALVES: tl.constexpr,
         MAPPED: tl.constexpr, BIASED: tl.constexpr, VALID: tl.constexpr, GIVEN: tl.constexpr, BK: tl.constexpr,
         BC: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """One token: the state is read once and written once, BV of its columns by each program."""
    first, bj = tl.program_id(0) * BV, tl.program_id(1).to(tl.int64)
    b, j = bj // J, bj % J
    one, columns = tl.arange(0, 1), first + tl.arange(0, BV)
    here = bj * HALVES * C * (V + 1)
    k += b * sk_b + (j // E) * sk_h
    v += b * sv_b + (j // E) * sv_h
    counts = 1.0
    if VALID:
        counts = (tl.load(valid + b) != 0).to(tl.float32)
    values = tl.load(v + columns, mask=columns < V, other=0.0).to(tl.float32)
    f = _token(k, w_k, b_k, j, 1.0, K, C, MAP, MAPPED, BIASED, BK, BC) * counts
    kv_p, z_p = f[:, None] * values[None, :], f
    if GIVEN:
        old, old_z = _read_state(states + here, 0, first, C, V, BC, BV)
        kv_p, z_p = kv_p + old, z_p + old_z
    _write_state(new + here, 0, first, kv_p, z_p, C, V, BC, BV)
    kv_n, z_n = kv_p, z_p
    if HALVES == 2:
        f = _token(k, w_k, b_k, j, -1.0, K, C, MAP, MAPPED, BIASED, BK, BC) * counts
        kv_n, z_n = f[:, None] * values[None, :], f
        if GIVEN:
            old, old_z = _read_state(states + here, 1, first, C, V, BC, BV)
            kv_n, z_n = kv_n + old, z_n + old_z
        _write_state(new + here, 1, first, kv_n, z_n, C, V, BC, BV)
    for r in range(R):
        h = j * R + r
        y = q + b * sq_b + h * sq_h
        f = _token(y, w_q, b_q, h, 1.0, K, C, MAP, MAPPED, BIASED, BK, BC)
        num, total = tl.sum(f[:, None] * kv_p, 0), tl.sum(f * z_p, 0)
        if HALVES == 2:
            f = _token(y, w_q, b_q, h, -1.0, K, C, MAP, MAPPED, BIASED, BK, BC)
            num += tl.sum(f[:, None] * kv_n, 0)
            total += tl.sum(f * z_n, 0)
        place = b * H + h
        tl.store(out + place * V + columns, (num / (total + eps)).to(out.dtype.element_ty), mask=columns < V)
        tl.store(mass + place + one, total + tl.zeros([1], tl.float32), mask=(one == 0) & (first == 0))


@triton.jit
def _token(x, w, bias, head, sign, K: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
           MAPPED: tl.constexpr, BIASED: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """One half of one token's features, [BC]. w [heads, K, C]."""
    rows, columns = tl.arange(0, BK), tl.arange(0, BC)
    if MAPPED:
        inside = (rows[:, None] < K) & (columns[None, :] < C)
        W = tl.load(w + head * K * C + rows[:, None] * C + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(x + rows, mask=rows < K, other=0.0).to(tl.float32)
        u = tl.sum(y[:, None] * W, 0)
    else:
        u = tl.load(x + columns, mask=columns < C, other=0.0).to(tl.float32)
    if BIASED:
        u += tl.load(bias + head * C + columns, mask=columns < C, other=0.0).to(tl.float32)
    return tl.reshape(_phi(u[None, :], sign, C, MAP, BC), [BC])
