"""Hedgehog: linear attention with learned, spiky feature maps, optionally beside an exact window.

Zhang et al., "The Hedgehog & the Porcupine" (2402.04347); hybrid form of LoLCATs (2410.10254) equation 7.

    y_t = phi_q(q_t) S_t / phi_q(q_t) z_t,   S_t = sum_{s <= t} phi_k(k_s) v_s^T,   z_t = sum_{s <= t} phi_k(k_s)

and in encoders the same with sums over all s. With `window: w` the last w tokens (in encoders: those less than w away
on either side; and `sinks: n` first ones) are exact softmax and the sums run over all others.
Ours: sinks are kept out of the state; the rule "lse"; maps shared per key/value head; the linear branch without RoPE;
the normaliser is the state's last column, in float32; padding is zeroed after the map.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from linearize.mixers.base import RecurrentMixer
from linearize.mixers.parts import Combination, FeatureMap, FeatureMapName, Local, LocalBranch, LocalConfig, local_mask
from linearize.ops.bidirectional import bidirectional
from linearize.ops.linear import linear
from linearize.ops.window import WindowOutput
from linearize.types import Context, Cost, InputError, SiteShape, State, StateSpec


class Branches(NamedTuple):
    """Both branches of one call: the local one (None without a window) and the linear one, each with its own
    normaliser: far_BHTV, mass_BHT (un-normalised sum of the linear weights)."""

    local: Local | WindowOutput | None
    far: Tensor
    mass: Tensor


class Hedgehog(RecurrentMixer):
    """See the top of this file. State per head of a causal layer: F x (V + 1) float32, plus window and sinks as they
    came."""

    paper = "https://arxiv.org/abs/2402.04347"
    kinds = frozenset({"causal", "bidirectional"})

    class Config(LocalConfig):
        feature_map: FeatureMapName = "split_softmax"
        features: int | None = Field(default=None, ge=1, description="columns of W; None: the head's key dim")
        tie: bool = Field(default=False, description="one map for q and k")
        share: Literal["query", "kv"] = Field(default="query", description="key maps per query head or per kv head")
        rope: Literal["keep", "undo"] = Field(default="keep", description="rotate the linear branch's q and k?")
        combine: Literal["lse", "lolcats"] = "lse"
        eps: float = Field(default=1e-12, gt=0)

    config: Config

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        c, H, G, K = config, shape.heads, shape.kv_heads, shape.key_dim
        self.key_heads = H if c.share == "query" else G
        if c.tie and self.key_heads != H:
            raise InputError("hedgehog: tie: true needs share: query (one map cannot serve H query and G key heads)")
        self.map_q = FeatureMap(c.feature_map, H, K, c.features)
        # A tied map is registered once: safetensors refuses one tensor under two names.
        self.map_k = None if c.tie else FeatureMap(c.feature_map, self.key_heads, K, c.features)
        self.local = LocalBranch(c, shape) if c.window or c.sinks else None
        self.combine = Combination(c.combine, H, self.map_q.columns) if self.local else None
        self.branches = ("window_off", "linear_off") if self.local else ()

    # -------------------------------------------------------------------------------------------- the function
    def chunked(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        if self.off == "window_off":
            return self._linear_everywhere(q_BHTK, k_BGTK, v_BGTV, ctx, state)
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

    def both(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Branches, State]:
        """The two branches apart: what `chunked` combines, and what far-field losses look at."""
        if state is None:
            state = self.empty_state(q_BHTK.shape[0], q_BHTK.device, k_BGTK.dtype)
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        if self.local is None:
            far, mass, state = self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx, state[:1])
            return Branches(None, far, mass), state
        if not self.shape.causal:
            far, mass, _ = self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx, gap=self.local.width)
            return Branches(self.local.two_sided(q_BHTK, k_BGTK, v_BGTV, ctx), far, mass), ()
        local = self.local(q_BHTK, k_BGTK, v_BGTV, ctx, state[1 : 1 + self._kept])
        rest = state[1 + self._kept :]
        far_k, kept_raw = local.far_k, ()
        if self.needs_rotary:  # the ring of rotated keys serves softmax, its twin of un-rotated keys the linear branch
            keys = torch.cat([rest[0].to(k_lin.dtype), k_lin], 2)
            T = k_lin.shape[2]
            far_k, kept_raw = keys[:, :, :T], (keys[:, :, T:],)
        far, mass, sums = self._linear(q_lin, far_k, local.far_v, local.far, ctx, state[:1])
        return Branches(local, far, mass), (*sums, *local.kept, *kept_raw)

    def _linear(
        self, q: Tensor, k: Tensor, v: Tensor, valid_BT: Tensor | None, ctx: Context, state: State = (), gap: int = 0
    ) -> tuple[Tensor, Tensor, State]:
        """(output_BHTV, mass_BHT, new sums). gap, of bidirectional layers: nearer keys are the window's."""
        phi_q, phi_k = self.map_q(q), self._map_keys(k)
        if valid_BT is not None:
            phi_k = phi_k * valid_BT[:, None, :, None]
        if self.shape.causal:
            out = linear(phi_q, phi_k, v, state=state[0] if state else None, segments_BT=ctx.segments_BT)
            state = (out.state,)
        else:
            out = bidirectional(phi_q, phi_k, v, gap=gap, segments_BT=ctx.segments_BT)
        return out.numerator / (out.normaliser + self.config.eps)[..., None], out.normaliser, state

    def _map_keys(self, k_BGTK: Tensor) -> Tensor:
        if self.key_heads != k_BGTK.shape[1]:
            k_BGTK = k_BGTK.repeat_interleave(self.shape.group, 1)
        return (self.map_k or self.map_q)(k_BGTK)

    @property
    def needs_rotary(self) -> bool:
        return self.config.rope == "undo"

    @property
    def _kept(self) -> int:
        return len(self.local.state_spec()) if self.local else 0

    def _unrotated(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        if not self.needs_rotary or ctx.rotary is None:  # None: this layer does not rotate (checked by attach)
            return q, k
        return ctx.rotary.undo(q), ctx.rotary.undo(k)

    def _linear_everywhere(self, q, k, v, ctx: Context, state: State) -> tuple[Tensor, State]:
        """Ablation "window off": the linear branch over all visible keys with its own normaliser."""
        if ctx.slot is not None:
            raise ValueError("branch ablations are for evaluation without a cache: pass use_cache=False")
        q_lin, k_lin = self._unrotated(q, k, ctx)
        out, _, _ = self._linear(q_lin, k_lin, v, ctx.valid_BT, ctx, state[:1])
        return out.to(q.dtype), state

    def linear_alone(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        """o_BHTV of the linear branch over all visible keys: what `target: linear` trains."""
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        return self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx)[0]

    # ------------------------------------------------------------------------------------------- the definition
    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        H = self.shape.heads
        c = self.config
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        visible_BTT, local_BTT = local_mask(ctx, q_BHTK, c.window, c.sinks, rows)
        q_BHTK = q_BHTK[:, :, rows]
        phi_k = self._map_keys(k_lin)
        phi_k = phi_k if phi_k.shape[1] == H else phi_k.repeat_interleave(self.shape.group, 1)
        feature_BHTT = self.map_q(q_lin[:, :, rows]) @ phi_k.mT
        if self.local is None or self.off == "window_off":
            weights = feature_BHTT * visible_BTT[:, None]
            return weights / (weights.sum(-1, keepdim=True) + c.eps)
        far_BHTT = feature_BHTT * (visible_BTT & ~local_BTT)[:, None]
        k = k_BGTK.to(far_BHTT.dtype).repeat_interleave(self.shape.group, 1)
        scores = (q_BHTK.to(far_BHTT.dtype) @ k.mT * ctx.scale).masked_fill(~local_BTT[:, None], -torch.inf)
        top = scores.amax(-1, keepdim=True)
        near_BHTT = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
        if self.off == "linear_off":
            return near_BHTT / (near_BHTT.sum(-1, keepdim=True) + c.eps)
        assert self.combine is not None
        if c.combine == "lolcats":
            near_BHTT = near_BHTT * self.combine.gate_H.to(scores.dtype).sigmoid()[:, None, None]
        else:  # exp(score) against phi phi exp(a + b |q|), both relative to the local maximum
            length = (q_BHTK.to(far_BHTT.dtype) * ctx.scale).norm(dim=-1, keepdim=True)
            gain = self.combine.offset_H.to(length.dtype)[:, None, None]
            gain = gain + self.combine.slope_H.to(length.dtype)[:, None, None] * length
            far_BHTT = far_BHTT * (gain - top.masked_fill(top == -torch.inf, 0)).exp()
        total = near_BHTT.sum(-1, keepdim=True) + far_BHTT.sum(-1, keepdim=True)
        return (near_BHTT + far_BHTT) / total.clamp(min=c.eps)

    # ------------------------------------------------------------------------------------------------ accounts
    def state_spec(self) -> list[StateSpec]:
        s, F = self.shape, self.map_q.features
        if not s.causal:
            return []
        specs = [StateSpec("sums", (-1, self.key_heads, F, s.value_dim + 1), torch.float32, 1)]
        if self.local:
            specs += self.local.state_spec()
            if self.needs_rotary:
                shape = (-1, s.kv_heads, self.config.window, s.key_dim)
                specs.append(StateSpec("kept_raw_keys", shape, torch.bfloat16, 1))
        return specs

    def cost(self, tokens: int) -> Cost:
        s, F, C, w = self.shape, self.map_q.features, 64, self.config.window
        maps = 2 * s.key_dim * self.map_q.columns * (s.heads + self.key_heads)
        state = 4 * F * (s.value_dim + 1) * s.heads
        inside = 2 * C * (F + s.value_dim) * s.heads
        near = 2 * (w + self.config.sinks) * (s.key_dim + s.value_dim) * s.heads
        if not s.causal:  # one product each way, or with a window a scan from either side
            state, inside, near = (state, 0, 0) if not w else (2 * state, 2 * inside, 2 * near)
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        return Cost(float(tokens * (maps + state + inside + near)), float(tokens * moved))
