"""SEA: exact softmax over the keys that a linear estimate of the attention map picks out.

Lee et al., "SEA: Sparse Linear Attention with Estimated Attention Mask" (2310.01777).

    E = estimate of each row as K pixels (estimate.py);  M = the z best pixels of a query, over all its heads together
    o_t = s_mix (s_prob softmax_M(q_t k^T) v) + (1 - s_mix) mean(v),   z = max(1, round(H k min(K, L) / L))

L is what the query sees, so that it reads about k keys per head whatever L is; pixels widen with it. mean(v): so far,
or in bidirectional layers by the columns' mean of the estimate. `block: b` is block-SEA: instead of pixels whole
blocks of b keys, for b queries together, as many pairs as pixels would have; a causal block of queries reads itself,
and chooses by the estimates of the b queries up to its first, which know no future. Where text and an image stand in
one sequence, text rows are exact softmax.
Ours: block-SEA; the budget counts pixels that cover a key (at L < K the paper's counts empty ones); losses on the full
map are summed over pixels, which is the same and holds no T x T, and nothing else teaches the estimator; no jitter of
pixels; see estimate.py for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.mixers.base import Mixer, MixerConfig
from linearize.mixers.documents import Documents
from linearize.mixers.estimate import Estimate, Estimator, Span, last_rows
from linearize.mixers.parts import FeatureMapName
from linearize.mixers.patches import beside_grid
from linearize.ops._dispatch import compute_dtype
from linearize.ops._softmax import attend
from linearize.ops.topk import block_softmax
from linearize.ops.topk.pixels import keep_best, keys_of, pixel_of, shares
from linearize.ops.topk.reference import weights_over
from linearize.types import Context, Cost, InputError, SiteShape, State, StateSpec

#: query rows whose weights over all keys are held at once
ROWS = 512


class _Call(NamedTuple):
    """One call, document by document: documents, span, estimate, and the choice kept_NHIM: by query and pixel, or by
    block of queries (by query, where a state came before) and block of keys."""

    docs: Documents
    span: Span
    estimate: Estimate
    kept: Tensor
    by_query: bool


class Sea(Mixer):
    """See the top of this file. Decoding keeps the teacher's keys and values, and of the estimator running sums and the
    last rows of its image: a state that grows. All scores of a step are made, and those that were not chosen hidden."""

    paper = "https://arxiv.org/abs/2310.01777"
    kinds = frozenset({"causal", "bidirectional", "joint"})
    ordered = True
    teaches = True
    adjustable = frozenset({"k", "block"})

    class Config(MixerConfig):
        k: int = Field(default=32, ge=1, description="keys that a query reads, for each head on average")
        width: int = Field(default=128, ge=8, multiple_of=4, description="pixels of an estimated row")
        block: int = Field(default=0, ge=0, description="0: pixel by pixel; else queries and keys by so many")
        feature_map: FeatureMapName = Field(default="split_softmax", description="of the estimator's linear attention")
        features: int | None = Field(default=None, ge=1, description="columns of its W; None: the head's key dim")

    config: Config

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        self.joined = shape.heads
        self.estimator = Estimator(shape, config.width, config.feature_map, config.features)
        self.adjust(config)

    def adjust(self, config: MixerConfig) -> None:
        assert isinstance(config, Sea.Config)
        if self.shape.causal and config.block > config.k:
            raise InputError(
                f"sea: a query reads its own block, so block ({config.block}) must not exceed k ({config.k})"
            )
        self.config = config

    @property
    def stateful(self) -> bool:
        return self.shape.causal

    @property
    def leaks(self) -> bool:
        return True

    @property
    def needs_grid(self) -> bool:
        return self.shape.joint

    # -------------------------------------------------------------------------------------------- the function
    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        call, parts, _ = self._call(q_BHTK, k_BGTK, v_BGTV, ctx, ())
        return self._answer(call, parts, (), q_BHTK, k_BGTK, v_BGTV, ctx, ())

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        if ctx.slot is None:
            return self.parallel(q_BHTK, k_BGTK, v_BGTV, ctx)
        state = ctx.slot.state or ()
        call, parts, ctx.slot.state = self._call(q_BHTK, k_BGTK, v_BGTV, ctx, state)
        return self._answer(call, parts, ctx.slot.state, q_BHTK, k_BGTK, v_BGTV, ctx, state)

    def taught(
        self,
        q_BHTK: Tensor,
        k_BGTK: Tensor,
        v_BGTV: Tensor,
        ctx: Context,
        target: Callable[[slice], Tensor],
        chunk: int,
        output: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """The loss is KL + squared error of the estimate as pixels, and spread over the keys (section 3.5 there): over
        a pixel of w keys the two squares differ by the factor w alone, the two KL by what nothing depends on."""
        call, parts, _ = self._call(q_BHTK, k_BGTK, v_BGTV, ctx, (), choose=output)
        out = self._answer(call, parts, (), q_BHTK, k_BGTK, v_BGTV, ctx, ()) if output else None
        log_BHTP = call.docs.together(call.estimate.log).clamp(min=-30)
        rank_BT, length_BT = self._places(call)
        codes_BT, loss = ctx.codes(q_BHTK), log_BHTP.new_zeros(())
        for start in range(0, q_BHTK.shape[2], chunk):
            rows = slice(start, start + chunk)
            pixel = self._pixel(rank_BT[:, None], length_BT[:, rows, None])
            with torch.no_grad():
                goal = target(rows)
                aim = torch.zeros_like(log_BHTP[:, :, rows])
                aim = aim.scatter_add(3, pixel[:, None].expand_as(goal), goal.to(aim.dtype))
            guess = log_BHTP[:, :, rows]
            covered = keys_of(length_BT[:, rows], self.config.width)[:, None].clamp(min=1)
            squares = (guess.exp() - aim) ** 2 * (1 + 1 / covered.to(guess.dtype))
            real = (codes_BT[:, rows] > 0)[:, None, :, None]
            loss = loss + ((torch.xlogy(aim, aim) - aim * guess + squares) * real).sum()
        return out, loss

    def _answer(
        self, call: _Call, parts: list[Tensor], past: State, q_BHTK, k_BGTK, v_BGTV, ctx: Context, state: State
    ) -> Tensor:
        dtype, group = compute_dtype(q_BHTK, k_BGTK, v_BGTV), self.shape.group
        keys, values = (past if state else parts[1:])[:2]
        v = parts[2].to(dtype)
        if self.config.block and not call.by_query:
            valid = None if self.shape.causal else call.span.valid
            many = {"block": self.config.block, "scale": ctx.scale, "causal": self.shape.causal, "valid_BT": valid}
            sparse = block_softmax(parts[0], keys, values, call.kept, **many)
        else:
            keys, values = (x.to(dtype).repeat_interleave(group, 1) for x in (keys, values))
            sparse = self._rows(parts[0].to(dtype), keys, values, call, ctx.scale)
        if self.shape.causal:
            totals = v.cumsum(2) + (state[3].to(dtype)[:, :, None] if state else 0)
            mean = (totals / call.span.length[:, None, :, None]).repeat_interleave(group, 1)
        else:
            mean = self._columns(call)[:, :, None] @ v.repeat_interleave(group, 1)
        inside, mix = call.estimate.gates.split(1, -1)
        out = call.docs.together(mix * inside * sparse + (1 - mix) * mean)
        if self.shape.joint:
            text_T = beside_grid(ctx, q_BHTK)
            whole = (x.to(dtype).repeat_interleave(group, 1) for x in (k_BGTK, v_BGTV))
            exact = attend(q_BHTK[:, :, text_T].to(dtype), *whole, ctx.scale, ctx.valid_BT)[0]
            out = out.index_copy(2, text_T.nonzero()[:, 0], exact)
        return out.to(q_BHTK.dtype)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: State, choose: bool = True
    ) -> tuple[_Call, list[Tensor], State]:
        """(the call, its q, k, v document by document, the state after it: keys and values first)."""
        plain = ctx.valid_BT is None and ctx.segments_BT is None
        docs = Documents.of(ctx.codes(q), plain)
        if state and len(docs.count_N) != len(q):
            raise InputError("sea: several documents in one row cannot go on from one state: a row for each of them")
        q, k, v = parts = [docs.apart(x) for x in (q, k, v)]
        T, first_N = q.shape[2], state[2] if state else torch.zeros_like(docs.count_N)
        alike = slice(1) if plain and not state else slice(None)
        rank_NT = first_N[alike, None] + torch.arange(T, device=q.device)
        length_NT = rank_NT + 1 if self.shape.causal else docs.count_N[alike, None].clamp(min=1).expand_as(rank_NT)
        span = Span(rank_NT, length_NT, docs.count_N, docs.valid_NL)
        estimate = self.estimator(q, k, v, span, state[4:7])
        kept, tail = self._choose(estimate, span, state) if choose else (estimate.log, ())
        call = _Call(docs, span, estimate, kept, not self.config.block or bool(state))
        keys, values = k, v
        if state:
            at_NT = rank_NT[:, None, :, None]
            room = int(rank_NT.max()) + 1
            filled = int((first_N + docs.count_N).max())
            wider = (F.pad(old.to(new.dtype), (0, 0, 0, room - old.shape[2])) for old, new in zip(state, (k, v)))
            keys, values = (x.scatter(2, at_NT.expand_as(new), new)[:, :, :filled] for x, new in zip(wider, (k, v)))
        if ctx.slot is None:
            return call, parts, ()
        wide = v.to(compute_dtype(q, k, v))
        total = (wide if docs.valid_NL is None else wide * docs.valid_NL[:, None, :, None]).sum(2)
        after = (keys, values, first_N + docs.count_N, total + (state[3] if state else 0), *estimate.state, *tail)
        return call, parts, tuple(x[docs.last_B] for x in after) if len(docs.last_B) < len(docs.count_N) else after

    # ---------------------------------------------------------------------------------------------- the choice
    def _choose(self, estimate: Estimate, span: Span, state: State) -> tuple[Tensor, State]:
        """(kept_NHIM, the last rows of the estimate that later blocks look at)."""
        c, H, log_NHTP = self.config, self.shape.heads, estimate.log.detach()
        if not c.block:
            filled = span.length.clamp(max=c.width)
            budget = (2 * H * c.k * filled + span.length) // (2 * span.length)
            budget = torch.minimum(budget.clamp(min=1), H * filled)
            return _jointly(log_NHTP, budget), ()
        b, rows, T = c.block, log_NHTP.exp(), log_NHTP.shape[2]
        if not self.shape.causal:
            rows = rows if span.valid is None else rows * span.valid[:, None, :, None]
            pooled = F.pad(rows, (0, 0, 0, -T % b)).unflatten(2, (-1, b)).sum(3)
            length = span.tokens[:, None]
            blocks = -(-length // b)
            count = torch.where(length > c.k, ((2 * H * c.k + b) // (2 * b)), H * blocks).clamp(min=1)
            score = self._shares(pooled, length, pooled.shape[2])
            there = torch.arange(pooled.shape[2], device=score.device) < blocks[..., None]
            score = score.masked_fill(~there[:, None], -torch.inf)
            return _jointly(score, torch.minimum(count, H * blocks).expand(-1, pooled.shape[2])), ()
        reach = 2 * b - 2
        before = state[7].to(rows.dtype) if state else rows.new_zeros(*rows.shape[:2], reach, c.width)
        x = torch.cat([before, rows], 2)
        tail = (last_rows(x, span.tokens, reach),)
        if not state:
            start = span.rank[:, ::b]
            pooled = x[:, :, b - 1 :].unfold(2, b, b).sum(-1)
        else:  # each query looks its own block's first row up
            start = span.rank // b * b
            total = F.pad(x.cumsum(2), (0, 0, 1, 0))
            last = (start - span.rank[:, :1] + reach + 1)[:, None, :, None].expand(*rows.shape[:2], -1, c.width)
            pooled = total.gather(2, last) - total.gather(2, last - b)
        seen = (start[..., None] + 1 + torch.arange(b, device=start.device)).clamp(max=c.k).sum(-1)
        left = H * (2 * seen - b * (b + 1))  # twice the pairs that pixels would have, without the own block's
        own = start // b
        count = ((left + b * b) // (2 * b * b)).clamp(min=0)
        count = torch.where(start < c.k, H * own, torch.minimum(count, H * own))
        blocks = int(span.rank.max()) // b + 1
        column = torch.arange(blocks, device=start.device)
        score = self._shares(pooled, start + 1, blocks).masked_fill((column >= own[..., None])[:, None], -torch.inf)
        return _jointly(score, count) | (column == own[..., None])[:, None], tail

    def _shares(self, pooled_NHIP: Tensor, length_NI: Tensor, blocks: int) -> Tensor:
        borders = self.config.block * torch.arange(blocks + 1, device=pooled_NHIP.device, dtype=pooled_NHIP.dtype)
        return shares(pooled_NHIP, length_NI[:, None], borders)

    def _rows(self, q: Tensor, keys: Tensor, values: Tensor, call: _Call, scale: float) -> Tensor:
        """Softmax over the kept keys, ROWS queries at a time."""
        place_S = torch.arange(keys.shape[2], device=q.device)

        def part(start: int) -> Tensor:
            rows = slice(start, start + ROWS)
            length = call.span.length[:, rows, None]
            seen = self._seen(call.kept[:, :, rows], place_S[None, None], length) & (place_S < length)[:, None]
            return weights_over(q[:, :, rows], keys, scale, seen) @ values

        starts = range(0, q.shape[2], ROWS)
        if len(starts) == 1:
            return part(0)
        run = (lambda s: checkpoint(part, s, use_reentrant=False)) if torch.is_grad_enabled() else part
        return torch.cat([run(start) for start in starts], 2)

    def _seen(self, kept_NHTM: Tensor, rank_NTS: Tensor, length_NT1: Tensor) -> Tensor:
        """Which keys, by their rank, a query's pixels or blocks cover: [N, H, T, S]."""
        block = self.config.block
        of = (rank_NTS // block).clamp(max=kept_NHTM.shape[3] - 1) if block else self._pixel(rank_NTS, length_NT1)
        of = of[:, None]
        return kept_NHTM.gather(3, of.expand(*kept_NHTM.shape[:3], of.shape[-1]))

    def _pixel(self, rank: Tensor, length: Tensor) -> Tensor:
        return pixel_of(rank, length, self.config.width).clamp(0, self.config.width - 1)  # some are not visible

    def _columns(self, call: _Call) -> Tensor:
        """Mean over the queries of the estimate at each key, [N, H, L], 0 at padding."""
        span, pixels = call.span, call.estimate.log.detach().exp()
        if span.valid is not None:
            pixels = pixels * span.valid[:, None, :, None]
        length = span.length[:, :1]
        density = pixels.sum(2) / (length * keys_of(length[:, 0], self.config.width).clamp(min=1))[:, None]
        pixel = self._pixel(span.rank, length)
        columns = density.gather(2, pixel[:, None].expand(*density.shape[:2], -1))
        return columns if span.valid is None else columns * span.valid[:, None]

    # ------------------------------------------------------------------------------------------- the definition
    def _places(self, call: _Call) -> tuple[Tensor, Tensor]:
        """(rank_BT, length_BT) of the tokens where they stand in the batch."""
        N = len(call.docs.count_N)
        both = torch.stack([call.span.rank, call.span.length], -1).expand(N, -1, -1)[:, None]
        rank, length = call.docs.together(both)[:, 0].unbind(-1)
        return rank, length.clamp(min=1)

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        dtype = compute_dtype(q_BHTK, k_BGTK, v_BGTV)
        call, *_ = self._call(q_BHTK, k_BGTK, v_BGTV, ctx.without_slot(), ())
        rank_BT, length_BT = self._places(call)
        kept = call.kept
        if not call.by_query:
            kept = kept[:, :, torch.arange(call.span.rank.shape[1], device=kept.device) // self.config.block]
        kept = call.docs.together(kept)[:, :, rows]
        visible = ctx.visible(q_BHTK, rows)[:, None]
        seen = self._seen(kept, rank_BT[:, None], length_BT[:, rows, None]) & visible
        q, k = q_BHTK[:, :, rows].to(dtype), k_BGTK.to(dtype).repeat_interleave(self.shape.group, 1)
        if self.shape.causal:
            mean = visible / length_BT[:, None, rows, None].to(dtype)
        else:
            mean = call.docs.together(self._columns(call)[..., None])[..., 0][:, :, None] * visible
        inside, mix = call.docs.together(call.estimate.gates)[:, :, rows].split(1, -1)
        weights = mix * inside * weights_over(q, k, ctx.scale, seen) + (1 - mix) * mean
        if self.shape.joint:
            text_T1 = beside_grid(ctx, q_BHTK)[rows, None]
            weights = torch.where(text_T1, weights_over(q, k, ctx.scale, visible), weights)
        return weights

    def maps(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> dict[str, Tensor]:
        """estimate: [B, H, T, K pixels]; interpolated: the same spread over the keys, [B, H, T, T]."""
        call, *_ = self._call(q_BHTK, k_BGTK, v_BGTV, ctx.without_slot(), ())
        rank_BT, length_BT = self._places(call)
        estimate = call.docs.together(call.estimate.log.exp())
        pixel = self._pixel(rank_BT[:, None], length_BT[..., None])
        density = estimate / keys_of(length_BT, self.config.width).clamp(min=1)[:, None]
        spread = density.gather(3, pixel[:, None].expand(-1, estimate.shape[1], -1, -1))
        return {"estimate": estimate, "interpolated": spread * ctx.visible(q_BHTK)[:, None]}

    # ------------------------------------------------------------------------------------------------ accounts
    def state_spec(self) -> list[StateSpec]:
        s, c = self.shape, self.config
        if not s.causal:
            return []
        specs = [
            StateSpec("kept_keys", (-1, s.kv_heads, -1, s.key_dim), torch.bfloat16, 1),
            StateSpec("kept_values", (-1, s.kv_heads, -1, s.value_dim), torch.bfloat16, 1),
            StateSpec("count", (-1,), torch.int64, None),
            StateSpec("totals", (-1, s.kv_heads, s.value_dim), torch.float32, 1),
            *self.estimator.state_spec(),
        ]
        rows = (-1, s.heads, 2 * c.block - 2, c.width)
        return specs + ([StateSpec("estimates", rows, torch.float32, 1)] if c.block else [])

    def state_bytes(self, tokens: int) -> int:
        grown = self.shape.kv_bytes(tokens) if self.shape.causal else 0
        return grown + sum(spec.nbytes() for spec in self.state_spec() if -1 not in spec.shape[1:])

    def cost(self, tokens: int) -> Cost:
        """Pixel by pixel all scores are made and most of them hidden: that form is quadratic."""
        s, c = self.shape, self.config
        read = min(tokens, c.k) if c.block else tokens
        sparse = 2.0 * read * (s.key_dim + s.value_dim) * s.heads
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        return Cost(tokens * (self.estimator.flops() + sparse), float(tokens * moved))


def _jointly(score_NHIM: Tensor, count_NI: Tensor) -> Tensor:
    """The `count` best entries of each row over all its heads together: bool [N, H, I, M]."""
    N, H, I, M = score_NHIM.shape
    together = score_NHIM.transpose(1, 2).flatten(2)
    return keep_best(together, count_NI.expand(N, I)).unflatten(2, (H, M)).transpose(1, 2)
