"""Parts that several methods share: feature maps by name, the exact local branch, its two combinations with a linear
branch, and the mixer made of both."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.base import MixerConfig, RecurrentMixer
from linearize.mixers.patches import beside_grid
from linearize.ops._dispatch import compute_dtype
from linearize.ops._maps import MAPS
from linearize.ops.mapped_linear import features
from linearize.ops.window import WindowOutput, window
from linearize.types import Context, InputError, SiteShape, State, StateSpec, Unsupported

# ------------------------------------------------------------------------------------------------- feature maps
FeatureMapName = Literal["split_softmax", "exp", "joint_softmax", "t2r", "relu", "elu"]


_PARAMETER_FREE = {"relu", "elu"}


class FeatureMap(nn.Module):
    """phi(x) = Phi(x W + b), one W per head, started at the identity. Hedgehog (2402.04347) section 4.2.

    x_BHTK -> features_BHTF in float32 (float64 stays). x is un-scaled: a constant factor cancels in the ratio.
    `columns` is W's width (None: K). A rectangular identity keeps the first columns of *interleaved* halves, so that
    no rotary pair loses both of its members.
    """

    def __init__(self, name: FeatureMapName, heads: int, key_dim: int, columns: int | None = None) -> None:
        super().__init__()
        self.name: FeatureMapName = name
        self.columns = key_dim if columns is None or name in _PARAMETER_FREE else columns
        self.features = self.columns * MAPS[name].factor
        if name not in _PARAMETER_FREE:
            self.weight_HKC = nn.Parameter(_identity(key_dim, self.columns).repeat(heads, 1, 1))
            if MAPS[name].bias:
                self.bias_HC = nn.Parameter(torch.zeros(heads, self.columns))

    def forward(self, x_BHTK: Tensor | None) -> Any:
        """The features; of None the map itself, (W, b), for ops that have it inside. A call, so that hooks which bring
        an offloaded module's weights run first."""
        weight, bias = getattr(self, "weight_HKC", None), getattr(self, "bias_HC", None)
        if x_BHTK is None:
            return weight, bias
        return features(x_BHTK.to(compute_dtype(x_BHTK)), self.name, weight, bias)


def _identity(rows: int, columns: int) -> Tensor:
    if columns >= rows:
        return torch.eye(rows, columns)
    half = rows // 2  # half-split rotary layout: coordinate i pairs with i + half
    order = torch.arange(rows).view(2, half).T.flatten() if rows % 2 == 0 else torch.arange(rows)
    return torch.eye(rows)[:, order[:columns]]


# ------------------------------------------------------------------------------------------------- local branch
class LocalConfig(MixerConfig):
    """Settings of the exact local branch: softmax over the last `window` tokens and the first `sinks` ones; on
    bidirectional layers over the `window` - 1 tokens on either side and the token itself."""

    window: int = Field(default=0, ge=0)
    sinks: int = Field(default=0, ge=0)


class Local(NamedTuple):
    """The local branch's answer, and the keys that are left for the far branch.

    output_BHTV, lse_BHT, max_BHT: softmax over window and sinks. far_k_BGTK, far_v_BGTV, far_BT: for column t the key
    that left the window just then, and whether it counts (not padding, not a sink, same document as the query).
    kept: the branch's part of the next state.
    """

    output: Tensor
    lse: Tensor
    max: Tensor
    far_k: Tensor
    far_v: Tensor
    far: Tensor
    kept: State


class LocalBranch:
    """Softmax over a window and sinks; all keys that are in neither come out `window` tokens later, for a far branch.

    Attending to keys that left the window is then plain causal attention over the delayed keys. Sinks are the first
    real tokens of a document, kept for ever and in no other branch. Distances are in columns, sinks in real tokens.
    Holds no parameters: gamma, a and b belong to the rule that combines. Raises Unsupported for sinks in bidirectional
    attention, and for a window over the patches of an image.
    """

    def __init__(self, config: LocalConfig, shape: SiteShape) -> None:
        self.width, self.sinks = config.window, config.sinks
        self.G, self.K, self.V = shape.kv_heads, shape.key_dim, shape.value_dim
        if config.sinks and not shape.causal:
            raise Unsupported(
                "sinks are first tokens that every later one sees, which means nothing in bidirectional attention: "
                "set sinks: 0"
            )
        if config.window and shape.image:
            raise Unsupported(
                "window counts tokens along a line, which is no distance between patches of an image: set window: 0 "
                "(hedgehog has radius for a circle of them)"
            )

    def state_spec(self, dtype: torch.dtype = torch.bfloat16) -> list[StateSpec]:
        """Keys and values are kept exactly as they came (`kept_`), the codes say what they are."""
        W, N, G = self.width, self.sinks, self.G
        specs = [
            StateSpec("kept_keys", (-1, G, W, self.K), dtype, 1),
            StateSpec("kept_values", (-1, G, W, self.V), dtype, 1),
            StateSpec("codes", (-1, W), torch.int64, None),  # 0 nothing, 1 a key, 2 a sink's key
        ]
        if N:
            specs += [
                StateSpec("kept_sink_keys", (-1, G, N, self.K), dtype, 1),
                StateSpec("kept_sink_values", (-1, G, N, self.V), dtype, 1),
                StateSpec("count", (-1,), torch.int64, None),  # real tokens so far
            ]
        return specs

    def __call__(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, kept: State) -> Local:
        W, N = self.width, self.sinks
        T = q_BHTK.shape[2]
        codes_BT = ctx.codes(q_BHTK)
        ring_k, ring_v, ring_codes_BW = kept[:3]
        rank_BT = self._ranks(codes_BT, kept[-1] if N else None)
        is_sink_BT = (rank_BT < N) & (codes_BT > 0)
        # In the ring a code only says key or sink: documents are never carried over into another call.
        plain_BS = torch.cat([(ring_codes_BW == 1).long(), codes_BT * ~is_sink_BT], 1)
        keys = torch.cat([ring_k.to(k_BGTK.dtype), k_BGTK], 2)
        values = torch.cat([ring_v.to(v_BGTV.dtype), v_BGTV], 2)
        if W:
            near = window(q_BHTK, keys, values, width=W, scale=ctx.scale, codes_BT=codes_BT, codes_BS=plain_BS)
            out, lse, top = near
        else:
            B, H = q_BHTK.shape[:2]
            out = q_BHTK.new_zeros(B, H, T, self.V, dtype=compute_dtype(q_BHTK))
            lse = top = out.new_full((B, H, T), -torch.inf)
        leaving_BT = plain_BS[:, :T]
        far_BT = leaving_BT > 0
        if ctx.segments_BT is not None:  # a key that outlives its document is nobody's
            far_BT = far_BT & (leaving_BT == codes_BT.cummax(1).values)
        new: list[Tensor] = [
            keys[:, :, T:],
            values[:, :, T:],
            torch.cat([ring_codes_BW, (codes_BT > 0).long() + is_sink_BT], 1)[:, T:],
        ]
        if N:
            sinks_k, sinks_v, filled_BN = self._sinks(k_BGTK, v_BGTV, codes_BT, rank_BT, kept)
            order_N = torch.arange(N, device=q_BHTK.device)
            seen = (codes_BT == 1)[..., None] & filled_BN[:, None] & (order_N <= rank_BT[..., None])
            merged = self._with_sinks(q_BHTK, sinks_k, sinks_v, seen, ctx.scale, out, lse, top)
            if ctx.segments_BT is not None and (torch.compiler.is_compiling() or bool((codes_BT > 1).any())):
                own = self._own_sinks(k_BGTK, v_BGTV, codes_BT, rank_BT, is_sink_BT)
                merged = self._with_sinks(q_BHTK, *own, ctx.scale, *merged)
            out, lse, top = merged
            new += [sinks_k, sinks_v, kept[-1] + (codes_BT > 0).sum(1)]
        return Local(out, lse, top, keys[:, :, :T], values[:, :, :T], far_BT, tuple(new))

    def two_sided(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> WindowOutput:
        """Softmax over the keys at distances below `window` on both sides: the bidirectional local branch."""
        T, codes_BT = q_BHTK.shape[2], ctx.codes(q_BHTK)
        width = self.width if torch.compiler.is_exporting() else min(self.width, T)
        return window(
            q_BHTK,
            k_BGTK,
            v_BGTV,
            width=width,
            ahead=width - 1,
            scale=ctx.scale,
            codes_BT=codes_BT,
            codes_BS=codes_BT,
        )

    def _ranks(self, codes_BT: Tensor, count_B: Tensor | None) -> Tensor:
        """How many real tokens of its document stand before each token."""
        real = (codes_BT > 0).long()
        rank = real.cumsum(1) - real
        rank = rank - (rank * self._starts(codes_BT)).cummax(1).values
        first = codes_BT <= 1
        return rank if count_B is None else rank + count_B[:, None] * first

    @staticmethod
    def _starts(codes_BT: Tensor) -> Tensor:
        """Where a document other than the first begins."""
        later = codes_BT[:, 1:] > codes_BT[:, :-1].cummax(1).values
        return torch.cat([torch.zeros_like(codes_BT[:, :1], dtype=torch.bool), later], 1) & (codes_BT > 1)

    def _sinks(self, k_BGTK, v_BGTV, codes_BT, rank_BT, kept) -> tuple[Tensor, Tensor, Tensor]:
        """The sink tables of the first document, the one that is carried on, with this call's sinks written in: keys,
        values [B, G, N, .], and which rows are filled [B, N]."""
        N = self.sinks
        place_BT = torch.where((codes_BT == 1) & (rank_BT < N), rank_BT, N)  # row N collects what is no sink

        def table(old_BGN, x_BGT):
            new = x_BGT.new_zeros(*x_BGT.shape[:2], N + 1, x_BGT.shape[-1])
            new = new.scatter_add(2, place_BT[:, None, :, None].expand_as(x_BGT), x_BGT)[:, :, :N]
            return new + old_BGN.to(new.dtype)

        real_B1 = kept[-1][:, None] + (codes_BT == 1).sum(1, keepdim=True)
        filled_BN = torch.arange(N, device=codes_BT.device) < real_B1
        return table(kept[3], k_BGTK), table(kept[4], v_BGTV), filled_BN

    def _own_sinks(self, k_BGTK, v_BGTV, codes_BT, rank_BT, is_sink_BT) -> tuple[Tensor, Tensor, Tensor]:
        """For tokens of later documents, the sinks of their own: keys, values [B, G, T, N, .], seen [B, T, N]. Shapes
        do not depend on how many documents there are, so that it compiles."""
        N, (B, T) = self.sinks, codes_BT.shape
        column_T = torch.arange(T, device=codes_BT.device)
        start_BT = torch.where(self._starts(codes_BT), column_T, 0).cummax(1).values
        # Where the j-th real token of the document that starts at each column stands (T: nowhere).
        place_BT = torch.where(is_sink_BT & (codes_BT > 1), start_BT * N + rank_BT, T * N)
        table = codes_BT.new_full((B, T * N + 1), T).scatter(1, place_BT, column_T.expand(B, T))
        own_BTN = table[:, :-1].view(B, T, N).gather(1, start_BT[..., None].expand(B, T, N))
        seen_BTN = (codes_BT > 1)[..., None] & (own_BTN <= column_T[:, None])
        index_BTN = own_BTN.clamp(max=T - 1).flatten(1)[:, None, :, None]

        def pick(x_BGT):
            picked = x_BGT.gather(2, index_BTN.expand(-1, x_BGT.shape[1], -1, x_BGT.shape[-1]))
            return picked.unflatten(2, (T, N))

        return pick(k_BGTK), pick(v_BGTV), seen_BTN

    def _with_sinks(self, q_BHTK, k, v, seen_BTN, scale, out, lse, top):
        """Merge softmax over sinks into softmax over the window, exactly, by log-sum-exp. k, v: one table for all
        tokens [B, G, N, .], or one for each [B, G, T, N, .]."""
        dtype, group = out.dtype, q_BHTK.shape[1] // self.G
        q, k, v = q_BHTK.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
        each = k.ndim == 5
        lowest = torch.finfo(dtype).min
        scores = (q[..., None, :] @ k.mT).squeeze(-2) if each else q @ k.mT
        scores = (scores * scale).masked_fill(~seen_BTN[:, None], lowest)
        top = torch.maximum(top, scores.amax(-1).masked_fill(~seen_BTN.any(-1)[:, None], -torch.inf))
        peak = top.clamp(min=lowest / 2).detach()
        weights = (scores - peak[..., None]).exp() * seen_BTN[:, None]
        window_mass = (lse - peak).exp()
        mass = window_mass + weights.sum(-1)
        filled = mass.clamp(min=torch.finfo(dtype).tiny)
        read = (weights[..., None, :] @ v).squeeze(-2) if each else weights @ v
        out = (window_mass[..., None] * out + read) / filled[..., None]
        return out, torch.where(mass > 0, peak + filled.log(), -torch.inf), top


def local_mask(
    ctx: Context,
    like_BHTK: Tensor,
    window_width: int,
    sinks: int,
    rows: slice = slice(None),
    joint: bool = False,
) -> tuple[Tensor, Tensor]:
    """(visible_BTT, local_BTT) from the definition: which keys the queries `rows` may see, and which of them are the
    local branch's. The dense oracle of every windowed method. joint: the local branch is
    `text_softmax`."""
    visible = ctx.visible(like_BHTK, rows)
    if joint:
        text_T = beside_grid(ctx, like_BHTK)
        return visible, visible & (text_T[rows, None] | text_T)
    column = torch.arange(visible.shape[-1], device=visible.device)
    distance = column[rows, None] - column
    local = (distance.abs() < window_width).expand_as(visible)
    if sinks:
        local = local | (_ranks_by_sorting(ctx.codes(like_BHTK)) < sinks)[:, None]
    return visible, visible & local


def _ranks_by_sorting(codes_BT: Tensor) -> Tensor:
    """How many tokens of its document stand before each, int64 [B, T]. Not as `LocalBranch` counts them, which it is
    there to check, and without a T x T tensor, so that long maps can be made piece by piece."""
    ordered_BT, column_BT = codes_BT.sort(dim=1, stable=True)
    first_BT = torch.searchsorted(ordered_BT, ordered_BT)  # of its document, in that order
    rank_BT = torch.arange(codes_BT.shape[1], device=codes_BT.device) - first_BT
    return torch.zeros_like(rank_BT).scatter(1, column_BT, rank_BT)


class Combination(nn.Module):
    """How the local branch and a linear far branch become one row of weights.

    "lolcats": numerators and denominators are added, the local ones relative to the local maximum and times
    gamma = sigmoid(g) per head (2410.10254 equation 7; the shift is not undone on the linear term: it is part of the
    function). "lse": the far branch's mass is taken for exp(L) with L = log z + a_h + b_h |q| and merged by
    log-sum-exp. a and b learn with the maps from whatever loss reads the merged output or map; the teacher's far mass
    itself teaches them only where a stage sets `mass` (0 by default, see recipes/LOG.md, H2).
    """

    def __init__(self, rule: Literal["lolcats", "lse"], heads: int, columns: int) -> None:
        super().__init__()
        self.rule = rule
        if rule == "lolcats":
            self.gate_H = nn.Parameter(torch.full((heads,), math.log(0.1 / 0.9)))
        else:
            # phi_q . phi_k of two flat split-softmax maps is 2 / columns, while exp(0) is 1.
            self.offset_H = nn.Parameter(torch.full((heads,), math.log(columns / 2)))
            self.slope_H = nn.Parameter(torch.zeros(heads))

    def far_log_mass(self, normaliser_BHT: Tensor, q_BHTK: Tensor, scale: float) -> Tensor:
        """L_l: the log mass the linear branch claims for the far keys (-inf where it holds none)."""
        dtype = normaliser_BHT.dtype
        tiny = torch.finfo(dtype).tiny
        log_z = torch.where(normaliser_BHT > 0, normaliser_BHT.clamp(min=tiny).log(), -torch.inf)
        length = (q_BHTK.to(dtype) * scale).norm(dim=-1)
        return log_z + self.offset_H.to(dtype)[:, None] + self.slope_H.to(dtype)[:, None] * length

    def forward(
        self, lse: Tensor, top: Tensor, normaliser: Tensor, q_BHTK: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(local mass, far mass) on a common scale, [B, H, T] each: the output is their weighted mean."""
        if self.rule == "lolcats":
            gamma = self.gate_H.to(lse.dtype).sigmoid()[:, None]
            empty = lse == -torch.inf  # nothing visible: -inf - -inf, and a where() would let its NaN into the gradient
            return gamma * (lse - top).masked_fill(empty, -torch.inf).exp(), normaliser
        far = self.far_log_mass(normaliser, q_BHTK, scale)
        peak = torch.maximum(lse, far)
        peak = peak.masked_fill(peak == -torch.inf, 0)
        return (lse - peak).exp(), (far - peak).exp()


# ----------------------------------------------------------------------------------------------- both in one mixer
class HybridConfig(LocalConfig):
    """Settings of a linear branch over features and of what stands beside it."""

    feature_map: FeatureMapName = "split_softmax"
    features: int | None = Field(default=None, ge=1, description="columns of W; None: the head's key dim")
    tie: bool = Field(default=False, description="one map for q and k")
    share: Literal["query", "kv"] = Field(default="query", description="key maps per query head or per kv head")
    rope: Literal["keep", "undo", "auto"] = Field(
        default="keep", description="rotate the linear branch's q and k? auto: undone in families that do"
    )
    combine: Literal["lse", "lolcats"] = "lse"
    eps: float = Field(default=1e-12, gt=0)


class Branches(NamedTuple):
    """Both branches of one call: the local one (None without a window) and the linear one, each with its own
    normaliser: far_BHTV, mass_BHT (un-normalised sum of the linear weights)."""

    local: Local | WindowOutput | None
    far: Tensor
    mass: Tensor


class Hybrid(RecurrentMixer):
    """A linear branch over features, and with `window` or `sinks` an exact local one that has the near keys to itself.

    A method is `both` and `linear_alone` (how its linear branch sums) and `far_weights` (which weights these sums
    have); maps, combination, ablations and the dense map are here.
    """

    kinds = frozenset({"causal", "bidirectional"})
    config: HybridConfig

    def __init__(self, shape: SiteShape, config: HybridConfig) -> None:
        super().__init__(shape, config)
        c, H, G, K = config, shape.heads, shape.kv_heads, shape.key_dim
        self.key_heads = H if c.share == "query" else G
        if c.tie and self.key_heads != H:
            raise InputError("tie: true needs share: query (one map cannot serve H query and G key heads)")
        self.map_q = FeatureMap(c.feature_map, H, K, c.features)
        # A tied map is registered once: safetensors refuses one tensor under two names.
        self.map_k = None if c.tie else FeatureMap(c.feature_map, self.key_heads, K, c.features)
        self.local = LocalBranch(c, shape) if c.window or c.sinks else None
        self.combine = Combination(c.combine, H, self.map_q.columns) if self.exact else None
        self.branches = ("window_off", "linear_off") if self.exact else ()

    @property
    def exact(self) -> bool:
        """Whether a local branch stands beside the linear one."""
        return self.local is not None or self.shape.joint

    def masks(self, ctx: Context, like_BHTK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(visible_BTT, local_BTT): the keys that the queries `rows` may see, and those that the local branch has."""
        return local_mask(ctx, like_BHTK, self.config.window, self.config.sinks, rows, self.shape.joint)

    @abstractmethod
    def both(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Branches, State]:
        """The two branches apart: what `chunked` combines, and what far-field losses look at."""

    @abstractmethod
    def linear_alone(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        """o_BHTV of the linear branch over all visible keys: what `target: linear` trains."""

    @abstractmethod
    def far_weights(
        self, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context, seen_BTT: Tensor, gap: int, rows: slice
    ) -> Tensor:
        """Un-normalised weights [B, H, rows, T] of the linear branch, from the definition, 0 where not seen. gap: the
        window that has the nearer keys (0: none)."""

    def chunked(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        if self.off == "window_off":
            if ctx.slot is not None:
                raise ValueError("branch ablations are for evaluation without a cache: pass use_cache=False")
            return self.linear_alone(q_BHTK, k_BGTK, v_BGTV, ctx).to(q_BHTK.dtype), state
        parts, state = self.both(q_BHTK, k_BGTK, v_BGTV, ctx, state)
        if parts.local is None:
            return parts.far.to(q_BHTK.dtype), state
        local = parts.local
        if self.off == "linear_off":
            return local.output.to(q_BHTK.dtype), state
        assert self.combine is not None
        near, far = self.combine(local.lse, local.max, parts.mass, q_BHTK, ctx.scale)
        out = (near[..., None] * local.output + far[..., None] * parts.far) / (near + far + self.config.eps)[..., None]
        return out.to(q_BHTK.dtype), state

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        c = self.config
        visible_BTT, local_BTT = self.masks(ctx, q_BHTK, rows)
        if not self.exact or self.off == "window_off":
            weights = self.far_weights(q_BHTK, k_BGTK, ctx, visible_BTT, 0, rows)
            return weights / (weights.sum(-1, keepdim=True) + c.eps)
        far_BHTT = self.far_weights(q_BHTK, k_BGTK, ctx, visible_BTT & ~local_BTT, c.window, rows)
        q = q_BHTK[:, :, rows].to(far_BHTT.dtype)
        k = k_BGTK.to(far_BHTT.dtype).repeat_interleave(self.shape.group, 1)
        scores = (q @ k.mT * ctx.scale).masked_fill(~local_BTT[:, None], -torch.inf)
        top = scores.amax(-1, keepdim=True)
        near_BHTT = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
        if self.off == "linear_off":
            return near_BHTT / (near_BHTT.sum(-1, keepdim=True) + c.eps)
        assert self.combine is not None
        if c.combine == "lolcats":
            near_BHTT = near_BHTT * self.combine.gate_H.to(scores.dtype).sigmoid()[:, None, None]
        else:  # exp(score) against phi phi exp(a + b |q|), both relative to the local maximum
            length = (q * ctx.scale).norm(dim=-1, keepdim=True)
            gain = self.combine.offset_H.to(length.dtype)[:, None, None]
            gain = gain + self.combine.slope_H.to(length.dtype)[:, None, None] * length
            far_BHTT = far_BHTT * (gain - top.masked_fill(top == -torch.inf, 0)).exp()
        total = near_BHTT.sum(-1, keepdim=True) + far_BHTT.sum(-1, keepdim=True)
        return (near_BHTT + far_BHTT) / total.clamp(min=c.eps)

    @property
    def needs_rotary(self) -> bool:
        return self.config.rope != "keep"

    @property
    def _kept(self) -> int:
        """How many tensors of the state are the local branch's."""
        return len(self.local.state_spec()) if self.local else 0

    def _unrotated(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if not self.needs_rotary or ctx.rotary is None:  # None: this layer does not rotate (checked by attach)
            return q, k
        return ctx.rotary.undo_both(q, k)

    def _for_key_heads(self, k_BGTK: Tensor) -> Tensor:
        return k_BGTK.repeat_interleave(self.shape.group, 1) if self.key_heads != k_BGTK.shape[1] else k_BGTK

    def _for_heads(self, x_BJTF: Tensor) -> Tensor:
        return x_BJTF.repeat_interleave(self.shape.group, 1) if self.key_heads != self.shape.heads else x_BJTF

    def _map_keys(self, k_BGTK: Tensor) -> Tensor:
        return (self.map_k or self.map_q)(self._for_key_heads(k_BGTK))
