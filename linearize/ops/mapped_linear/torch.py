"""Causal linear attention with its feature maps, plain torch: chunks that fit the cache, O(T), any device.

Features live for one chunk only; for the backward pass a state is kept every SPAN chunks, and what lies between is
computed again. Products are of float32 (float64 stays), for bfloat16 inputs of bfloat16 with float32 states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.ops._arena import Arena
from linearize.ops._maps import LEAST, MAPS

CHUNK = 64
#: heads (times sequences) that are worked on at once: their chunks, features and states fit a core's cache
ROWS = 8
#: chunks between two states that are kept for the backward pass
SPAN = 16


class Inputs(NamedTuple):
    """q as [B, J, R, T, K]: R query heads of each key head. k, v as [B, G, E, T, .], expanded: E key heads of each
    group. Maps' weights [H, K, C], [J, K, C] and biases may be None."""

    q: Tensor
    k: Tensor
    v: Tensor
    weights: tuple[Tensor | None, Tensor | None]
    biases: tuple[Tensor | None, Tensor | None]
    valid_BT: Tensor | None
    segments_BT: Tensor | None
    name: str
    chunk: int

    @property
    def high(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def low(self) -> torch.dtype:
        return torch.bfloat16 if self.q.dtype == torch.bfloat16 else self.high

    @property
    def columns(self) -> int:
        weight = self.weights[0]
        return self.q.shape[-1] if weight is None else weight.shape[-1]

    @property
    def features(self) -> int:
        return self.columns * MAPS[self.name].factor


def arrange(q_BHTK, k_BGTK, v_BGTV, weights, biases, valid_BT, segments_BT, name, key_heads, chunk) -> Inputs:
    def spread(x_BGT: Tensor) -> Tensor:
        return x_BGT.unsqueeze(2).expand(-1, -1, key_heads // x_BGT.shape[1], -1, -1)

    q = q_BHTK.unflatten(1, (key_heads, -1))
    chunk = min(chunk, q.shape[3])
    return Inputs(q, spread(k_BGTK), spread(v_BGTV), weights, biases, valid_BT, segments_BT, name, chunk)


class Rows(NamedTuple):
    """Some sequences, and some groups of key heads of each."""

    batch: slice
    groups: slice
    heads: slice  # the key heads of these groups


def blocks(x: Inputs) -> Iterator[Rows]:
    B, J, R = x.q.shape[:3]
    G, E = x.k.shape[1:3]
    at_once = ROWS * torch.get_num_threads()
    groups = max(1, min(G, at_once // (E * R)))
    batch = max(1, at_once // (J * R)) if groups == G else 1
    for b in range(0, B, batch):
        for g in range(0, G, groups):
            last = min(g + groups, G)
            yield Rows(slice(b, min(b + batch, B)), slice(g, last), slice(g * E, last * E))


class Masks(NamedTuple):
    """Of one chunk, broadcastable to [b, j, R, chunk, .]: which keys each query sees; with documents also which
    queries read the state, which keys go into the next one, and whether the state lives on (None: all do)."""

    sees: Tensor
    reads: Tensor | None = None
    writes: Tensor | None = None
    keeps: Tensor | None = None


class Sums(NamedTuple):
    """A state, or the gradient of one: sums of phi_k v^T, [n, F, V], and of phi_k, [n, F]. The normaliser stands apart
    because products with V + 1 columns are a fifth slower than with V."""

    kv: Tensor
    k: Tensor


class Work:
    """The buffers of one block of rows, for chunks of one length, and what is done with them. n: key heads at once."""

    def __init__(self, x: Inputs, rows: Rows, length: int, arena: Arena) -> None:
        self.x, self.rows, self.length, self.arena = x, rows, length, arena
        b, (g, E), self.R = x.q[rows.batch].shape[0], x.k[0, rows.groups].shape[:2], x.q.shape[2]
        self.n, self.outer = b * g * E, (b, g, E)
        n, R, C, F, K, V = self.n, self.R, x.columns, x.features, x.q.shape[-1], x.v.shape[-1]

        def make(*sizes: int, dtype: torch.dtype = x.low) -> Tensor:
            return arena.make(*sizes, dtype=dtype)

        self.own_q, self.own_k = make(n * R, length, K, dtype=x.high), make(n, length, K, dtype=x.high)
        self.own_v, self.written = make(n, length, V), make(n, length, V)
        self.phi_q, self.phi_k = make(n * R, length, F), make(n, length, F)
        self.halves, self.out = make(n * R, length, 2, C, dtype=x.high), make(n, R * length, V)
        if x.low == x.high:  # of what is not needed at the same time, one stands in the other's place: less to cache
            both = make(n * R * length * max(C, length))
            self.u = both[: n * R * length * C].view(n * R, length, C)
            self.scores = both[: n * R * length**2].view(n, R * length, length)
        else:
            self.u, self.scores = make(n * R, length, C, dtype=x.high), make(n, R * length, length)
        shared = x.low == x.high and F == 2 * C
        self.wide = self.halves.view(n, R * length, F) if shared else make(n, R * length, F, dtype=x.high)
        self.update, self.low_kv = make(n, F, V), make(n, F, V)
        self.sum_k, self.mass = make(n, F, dtype=x.high), make(n, R * length, dtype=x.high)
        self.near_mass = make(n, R * length, dtype=x.high)
        self.lower = torch.ones(length, length, dtype=x.low, device=x.q.device).tril()

        def each(t: Tensor | None, R: int) -> Tensor | None:
            if t is None:
                return None
            t = t[rows.heads.start * R : rows.heads.stop * R].to(x.high)
            return t.expand(b, *t.shape).flatten(0, 1)

        self.w_q, self.w_k = each(x.weights[0], R), each(x.weights[1], 1)
        self.b_q, self.b_k = each(x.biases[0], R), each(x.biases[1], 1)
        # Making a view costs as much as adding up a thousand numbers: those of every chunk are made once.
        self.queries = self.phi_q.view(n, R * length, F)  # the query heads of a key head side by side
        self.q_views, self.k_views = (self._views(rows) for rows in (n * R, n))
        self.q, self.k, self.v = x.q[rows.batch, rows.heads], x.k[rows.batch, rows.groups], x.v[rows.batch, rows.groups]
        if b == 1 and self.q.dtype == x.high:
            self.q = self.q[0].flatten(0, 1)
        if b == 1 and E == 1:
            self.k = self.k[0, :, 0] if self.k.dtype == x.high else self.k
            self.v = self.v[0, :, 0] if self.v.dtype == x.low else self.v

    def _views(self, rows: int) -> tuple[Tensor, ...]:
        halves = self.halves[:rows]
        return self.u[:rows], halves, halves[:, :, 0], halves[:, :, 1], self.wide.view(-1, *self.phi_q.shape[1:])[:rows]

    def masks(self, part: slice) -> Masks:
        x, batch = self.x, self.rows.batch
        if x.segments_BT is None:
            return Masks(self.lower)
        now = x.segments_BT[batch, part]
        before, last = x.segments_BT[batch, max(part.start - 1, 0), None], now[:, -1:]
        sees = self.lower * (now[:, :, None] == now[:, None]).to(x.low)[:, None, None]
        reads, writes = ((now == s).to(x.low)[:, None, None, :, None] for s in (before, last))
        return Masks(sees, reads, writes, (last == before).to(x.high)[:, None])

    def by_rows(self, t: Tensor) -> Tensor:
        """[n, R * chunk, ...] as [b, j, R, chunk, ...], which masks broadcast to."""
        b, g, E = self.outer
        return t.view(b, g * E, -1, self.length, *t.shape[2:])

    def queries_of(self, part: slice) -> Tensor:
        """q of this chunk, [n * R, chunk, K]: where it stands, or a copy in the right type and order."""
        return self._of(self.q, part, self.own_q)

    def keys_of(self, part: slice) -> Tensor:
        return self._of(self.k, part, self.own_k)

    def values_of(self, part: slice, masks: Masks) -> tuple[Tensor, Tensor]:
        """v, and those of it that live on."""
        v = self._of(self.v, part, self.own_v)
        if masks.writes is None:
            return v, v
        b, g, E = self.outer
        shape = (b, g * E, 1, self.length, -1)
        torch.mul(v.unflatten(0, (b, -1))[:, :, None], masks.writes, out=self.written.view(shape))
        return v, self.written

    def _of(self, x: Tensor, part: slice, own: Tensor) -> Tensor:
        x = x.narrow(-2, part.start, self.length)
        if x.ndim == 3:
            return x
        own.view(x.shape).copy_(x)
        return own

    def map_queries(self, x: Tensor) -> None:
        self._map(x, self.w_q, self.b_q, self.phi_q, *self.q_views)

    def map_keys(self, x: Tensor, part: slice, phi_k: Tensor) -> Tensor:
        """phi_k, 0 at padding."""
        self._map(x, self.w_k, self.b_k, phi_k, *self.k_views)
        if self.x.valid_BT is not None:
            self.by_rows(phi_k).mul_(self.x.valid_BT[self.rows.batch, None, None, part, None])
        return phi_k

    def _map(self, x, weight, bias, out: Tensor, u: Tensor, halves: Tensor, first, second, wide: Tensor) -> None:
        u = x if weight is None else torch.bmm(x, weight, out=u)
        u = u if bias is None else u.add_(bias[:, None])
        if self.x.name != "split_softmax":
            out.copy_(MAPS[self.x.name].run(u))
            return
        first.copy_(u)
        torch.neg(u, out=second)
        soft = out if out.dtype == u.dtype else wide
        torch.softmax(halves, -1, out=soft.view_as(halves))
        soft.clamp_(min=LEAST)
        if soft is not out:
            out.copy_(soft)

    def low(self, t: Tensor, buffer: Tensor) -> Tensor:
        return t if t.dtype == self.x.low else buffer.copy_(t)

    def advance(self, state: Sums, phi_k: Tensor, written: Tensor, masks: Masks) -> None:
        """The state after this chunk, in place."""
        if masks.writes is not None:
            self.keep(state, masks)
            phi_k = (self.by_rows(phi_k) * masks.writes).view(phi_k.shape)
        self.add(state.kv, phi_k.mT, written)
        state.k.add_(torch.sum(phi_k, 1, dtype=self.x.high, out=self.sum_k))

    def keep(self, state: Sums, masks: Masks) -> None:
        assert masks.keeps is not None
        b = self.outer[0]
        state.kv.view(b, -1, *state.kv.shape[1:]).mul_(masks.keeps[..., None])
        state.k.view(b, -1, state.k.shape[-1]).mul_(masks.keeps)

    def add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total <- total + a b, in total's precision."""
        if total.dtype == a.dtype:
            total.baddbmm_(a, b)
        else:
            total.add_(torch.bmm(a, b, out=self.update))

    def weigh(self, phi_k: Tensor, masks: Masks) -> Tensor:
        """phi_q . phi_k where seen, [n, R * chunk, chunk]."""
        torch.bmm(self.queries, phi_k.mT, out=self.scores)
        self.by_rows(self.scores).mul_(masks.sees)
        return self.scores

    def read(self, state: Sums, scores: Tensor, v: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """(numerator [n, R * chunk, V], mass [n, R * chunk])."""
        out = torch.bmm(self.queries, self.low(state.kv, self.low_kv), out=self.out)
        mass = torch.sum(torch.mul(self.queries, state.k[:, None], out=self.wide), -1, out=self.mass)
        if masks.reads is not None:
            self.by_rows(out).mul_(masks.reads)
            self.by_rows(mass).mul_(masks.reads[..., 0])
        mass.add_(torch.sum(scores, -1, dtype=self.x.high, out=self.near_mass))
        return out.baddbmm_(scores, v), mass


def chunks(x: Inputs) -> list[slice]:
    T = x.q.shape[3]
    return [slice(i, min(i + x.chunk, T)) for i in range(0, T, x.chunk)]


def apart(state: Tensor) -> Sums:
    """[b, j, F, V + 1] as Sums over rows, copied."""
    state = state.flatten(0, 1)
    return Sums(state[..., :-1].clone(), state[..., -1].clone())


def joined(state: Sums, into: Tensor) -> None:
    into[..., :-1] = state.kv.view(*into.shape[:-1], -1)
    into[..., -1] = state.k.view(into.shape[:-1])


def forward(x: Inputs, state_BJFV1: Tensor | None, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output_BJRTV, mass_BJRT, state, states kept [B, J, spans, F, V+1], empty unless `keep`)."""
    B, J, R, T, _ = x.q.shape
    V = x.v.shape[-1]
    parts = chunks(x)
    output, mass = x.q.new_empty(B, J, R, T, V), x.q.new_empty(B, J, R, T, dtype=x.high)
    new = x.q.new_zeros(B, J, x.features, V + 1, dtype=x.high)
    if state_BJFV1 is not None:
        new.copy_(state_BJFV1)
    kept = new.new_empty(B, J, -(-len(parts) // SPAN) if keep else 0, x.features, V + 1)
    for rows in blocks(x):
        here, arena = (rows.batch, rows.heads), Arena(x.q)
        work, state = Work(x, rows, x.chunk, arena), apart(new[here])
        outputs, masses = output[here], mass[here]
        for i, part in enumerate(parts):
            if part.stop - part.start != work.length:
                work = Work(x, rows, part.stop - part.start, arena)
            if keep and i % SPAN == 0:
                joined(state, kept[*here, i // SPAN])
            masks = work.masks(part)
            phi_k = work.map_keys(work.keys_of(part), part, work.phi_k)
            work.map_queries(work.queries_of(part))
            v, written = work.values_of(part, masks)
            out, total = work.read(state, work.weigh(phi_k, masks), v, masks)
            work.advance(state, phi_k, written, masks)
            total = work.by_rows(total)
            masses.narrow(3, part.start, work.length).copy_(total)
            torch.div(work.by_rows(out), total.add_(eps)[..., None], out=outputs.narrow(3, part.start, work.length))
        joined(state, new[here])
        arena.done()
    return output, mass, new, kept
