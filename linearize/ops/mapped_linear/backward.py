"""The gradients of `mapped_linear` in plain torch, from the last chunk to the first.

Features and states of SPAN chunks at a time are computed again from a state that the forward pass kept. With
o = num / (mass + eps), d num = d o / (mass + eps), and what comes to the mass is d mass - d num . o.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._arena import Arena
from linearize.ops._maps import MAPS
from linearize.ops.mapped_linear.operator import Passes, build
from linearize.ops.mapped_linear.torch import (
    CHUNK,
    SPAN,
    Inputs,
    Masks,
    Rows,
    Sums,
    Work,
    apart,
    arrange,
    blocks,
    chunks,
    forward,
    joined,
)


class BackWork(Work):
    """`Work` with the buffers of gradients."""

    def __init__(self, x: Inputs, rows: Rows, length: int, arena: Arena) -> None:
        super().__init__(x, rows, length, arena)
        like = arena.like
        self.d_high, self.product = like(self.out, dtype=x.high), like(self.out, dtype=x.high)
        self.d_num, self.d_read, self.d_mass = like(self.out), like(self.out), like(self.mass)
        self.d_scores, self.d_v = like(self.scores), like(self.own_v)
        self.d_phi_q, self.d_phi_k = like(self.phi_q), like(self.phi_k)
        self.d_x, self.d_low_kv = like(self.own_q), like(self.low_kv)
        self.dot = like(self.halves[..., :1])

    def gradients(self, at, output: Tensor, mass: Tensor, d_output: Tensor, d_mass: Tensor, eps: float) -> Tensor:
        """d num [n, R * chunk, V], with d mass in its buffer."""
        d_high = self.by_rows(self.d_high)
        torch.div(d_output[at], (mass[at] + eps)[..., None], out=d_high)
        torch.mul(d_high, output[at], out=self.by_rows(self.product))
        torch.sum(self.product, -1, out=self.d_mass)
        torch.sub(d_mass[at], self.by_rows(self.d_mass), out=self.by_rows(self.d_mass))
        return self.low(self.d_high, self.d_num)

    def to_features(
        self, d_num: Tensor, phi_k: Tensor, state: Sums, d_state: Sums, v: Tensor, written: Tensor, masks: Masks
    ) -> None:
        """d_phi_q, d_phi_k and d_v of this chunk in their buffers, and d_state as it was before it."""
        by_rows, queries, d_mass = self.by_rows, self.queries, self.d_mass
        scores = self.weigh(phi_k, masks)
        d_scores = torch.bmm(d_num, v.mT, out=self.d_scores).add_(d_mass[..., None])
        by_rows(d_scores).mul_(masks.sees)
        d_read = d_num
        if masks.reads is not None:
            d_read = self.d_read
            torch.mul(by_rows(d_num), masks.reads, out=by_rows(d_read))
            by_rows(d_mass).mul_(masks.reads[..., 0])

        d_queries = torch.bmm(d_read, self.low(state.kv, self.low_kv).mT, out=self.d_phi_q.view_as(queries))
        d_queries.addcmul_(d_mass[..., None].to(d_queries.dtype), state.k[:, None].to(d_queries.dtype))
        d_queries.baddbmm_(d_scores, phi_k)
        d_kv = self.low(d_state.kv, self.d_low_kv)
        d_keys = torch.bmm(written, d_kv.mT, out=self.d_phi_k)
        d_v = torch.bmm(phi_k, d_kv, out=self.d_v)
        if masks.writes is None:
            d_keys.add_(d_state.k[:, None])
        else:
            b, (n, F) = self.outer[0], d_state.k.shape
            by_rows(d_keys).addcmul_(masks.writes, d_state.k.view(b, n // b, 1, 1, F).to(d_keys.dtype))
            by_rows(d_v).mul_(masks.writes)
            self.keep(d_state, masks)
        d_keys.baddbmm_(d_scores.mT, queries)
        d_v.baddbmm_(scores.mT, d_num)
        self.add(d_state.kv, queries.mT, d_read)
        d_state.k.add_(torch.sum(torch.mul(queries, d_mass[..., None], out=self.wide), 1, out=self.sum_k))

    def unmap(self, phi: Tensor, d_phi: Tensor) -> Tensor:
        """d u of u = x W + b, [rows, chunk, C], from the features and their gradient."""
        if self.x.name != "split_softmax":
            return MAPS[self.x.name].back(phi, d_phi).to(self.x.high)
        views = self.q_views if phi is self.phi_q else self.k_views
        n, (u, d_halves, *_) = len(phi), views
        halves = phi.view(d_halves.shape)
        torch.mul(halves, d_phi.view_as(halves), out=d_halves)
        dot = torch.sum(d_halves, -1, keepdim=True, out=self.dot[:n])
        d_halves.addcmul_(halves.to(d_halves.dtype), dot, value=-1)
        return torch.sub(d_halves[:, :, 0], d_halves[:, :, 1], out=u)

    def through_map(self, phi, d_phi, x, weight, d_weight, d_bias) -> Tensor:
        """d x, with the map's own gradients added to their totals."""
        d_u = self.unmap(phi, d_phi)
        if d_bias is not None:
            d_bias += d_u.sum(1)
        if weight is None:
            return d_u
        d_weight.baddbmm_(x.mT, d_u)
        return torch.bmm(d_u, weight.mT, out=self.d_x[: len(x)])


def backward(
    x: Inputs,
    output: Tensor,
    mass: Tensor,
    kept: Tensor,
    d_output: Tensor,
    d_mass: Tensor,
    d_new: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, W_q, W_k, b_q, b_k and the state, in the shapes of forward's inputs; empty where there is
    no such weight."""
    B, _, R, T, K = x.q.shape
    G, V = x.k.shape[1], x.v.shape[-1]
    made = x.q.new_empty(x.q.shape), x.k.new_empty(B, G, T, K), x.v.new_empty(B, G, T, V), torch.empty_like(d_new)
    d_maps = [x.q.new_zeros(0 if w is None else w.shape, dtype=x.high) for w in (*x.weights, *x.biases)]
    for rows in blocks(x):
        totals = _rows(x, rows, (output, mass, d_output, d_mass), kept, d_new, made, eps)
        queries, keys = slice(rows.heads.start * R, rows.heads.stop * R), rows.heads
        for d_map, total, heads in zip(d_maps, totals, (queries, keys, queries, keys), strict=True):
            if total is not None:
                d_map[heads] += total.unflatten(0, (-1, heads.stop - heads.start)).sum(0)
    d_q, d_k, d_v, d_first = made
    return (d_q, d_k, d_v, *d_maps, d_first)


def _rows(x: Inputs, rows: Rows, given, kept: Tensor, d_new: Tensor, made, eps: float) -> list[Tensor | None]:
    """One block: fills its part of `made`, returns the gradients of its maps."""
    d_q, d_k, d_v, d_first = made
    batch, groups, heads = rows
    here, parts = (batch, heads), chunks(x)
    arena = Arena(x.q)
    works = {length: BackWork(x, rows, length, arena) for length in {part.stop - part.start for part in parts}}
    work, d_state = works[x.chunk], apart(d_new[here])
    size = min(SPAN, len(parts))
    states = [Sums(arena.like(d_state.kv), arena.like(d_state.k)) for _ in range(size)]
    features = [arena.like(work.phi_k) for _ in range(size)]
    totals = [None if w is None else torch.zeros_like(w) for w in (work.w_q, work.w_k, work.b_q, work.b_k)]
    for first in reversed(range(0, len(parts), SPAN)):
        span = parts[first : first + SPAN]
        states[0] = apart(kept[*here, first // SPAN])
        for i, part in enumerate(span):
            work = works[part.stop - part.start]
            masks = work.masks(part)
            phi_k = work.map_keys(work.keys_of(part), part, features[i][:, : work.length])
            if i + 1 < len(span):
                for after, before in zip(states[i + 1], states[i], strict=True):
                    after.copy_(before)
                work.advance(states[i + 1], phi_k, work.values_of(part, masks)[1], masks)
        for i, part in reversed(list(enumerate(span))):
            work = works[part.stop - part.start]
            masks, at = work.masks(part), (*here, slice(None), part)
            phi_k, q, k = features[i][:, : work.length], work.queries_of(part), work.keys_of(part)
            work.map_queries(q)
            d_num = work.gradients(at, *given, eps)
            work.to_features(d_num, phi_k, states[i], d_state, *work.values_of(part, masks), masks)
            if x.valid_BT is not None:
                work.by_rows(work.d_phi_k).mul_(x.valid_BT[batch, None, None, part, None])
            d_x = work.through_map(work.phi_q, work.d_phi_q, q, work.w_q, totals[0], totals[2])
            d_q[at] = work.by_rows(d_x.view(work.n, -1, d_x.shape[-1]))
            d_x = work.through_map(phi_k, work.d_phi_k, k, work.w_k, totals[1], totals[3])
            _gather(d_k[batch, groups, part], d_x, work.outer)
            _gather(d_v[batch, groups, part], work.d_v, work.outer)
    joined(d_state, d_first[here])
    arena.done()
    return totals


def _gather(total: Tensor, part: Tensor, outer: tuple[int, int, int]) -> None:
    """Gradients of key heads, summed over those of a group."""
    part = part.unflatten(0, outer)
    total.copy_(part[:, :, 0] if outer[-1] == 1 else part.sum(2))


def _forward(q, k, v, w_q, w_k, b_q, b_k, valid, segments, state, name, key_heads, eps, keep):
    x = arrange(q, k, v, (w_q, w_k), (b_q, b_k), valid, segments, name, key_heads, CHUNK)
    output, mass, new, kept = forward(x, state, eps, keep)
    return output.flatten(1, 2), mass.flatten(1, 2), new, kept


def _backward(
    q, k, v, w_q, w_k, b_q, b_k, valid, segments, output, mass, kept, d_output, d_mass, d_state, name, key_heads, eps
):
    x = arrange(q, k, v, (w_q, w_k), (b_q, b_k), valid, segments, name, key_heads, CHUNK)
    output, mass, d_output, d_mass = (t.unflatten(1, (key_heads, -1)) for t in (output, mass, d_output, d_mass))
    d_q, *rest = backward(x, output, mass, kept, d_output, d_mass, d_state, eps)
    return (d_q.flatten(1, 2), *rest)


mapped_linear_torch = build("torch", Passes(_forward, _backward, lambda T: -(-T // (CHUNK * SPAN))))
