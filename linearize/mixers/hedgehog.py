"""Hedgehog: linear attention with learned, spiky feature maps, optionally beside an exact window.

Zhang et al., "The Hedgehog & the Porcupine" (2402.04347); hybrid form of LoLCATs (2410.10254) equation 7.

    y_t = phi_q(q_t) S_t / phi_q(q_t) z_t,   S_t = sum_{s <= t} phi_k(k_s) v_s^T,   z_t = sum_{s <= t} phi_k(k_s)

and in encoders the same with sums over all s. With `window: w` the last w tokens (in encoders: those less than w away
on either side; and `sinks: n` first ones) are exact softmax and the sums run over all others. Where text and an image
stand in one sequence, text rows and columns are exact softmax and the sums run over the image. On images `radius: r`
is the window: the patches less than r away (2412.16112), and all tokens that are no patches. With `decay` S and z
fade on the way, each feature at its own rate: S_t = exp(g_t) S_{t-1} + .., g_t = -softplus(r + W_g k_t); "learned": r
alone. In encoders what stands on the right fades at rates of its own, so that a feature may look one way only.
Ours: decay (the paper's state keeps everything; the gates are GLA's, 2312.06635); sinks are kept out of the state; the
rule "lse"; maps shared per key/value head; the linear branch without RoPE; the normaliser is the state's last column,
in float32; padding is zeroed after the map.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from linearize.mixers.parts import Branches, Hybrid, HybridConfig
from linearize.mixers.patches import CircleBranch, beside_grid, seen_in_circle, text_softmax
from linearize.ops._dispatch import compute_dtype
from linearize.ops.bidirectional import Circle, bidirectional, in_pieces, one_by_one
from linearize.ops.gated_linear import gated_bidirectional, gated_linear, gated_weights
from linearize.ops.local2d import pairs
from linearize.ops.mapped_linear import MappedOutput, mapped_linear
from linearize.types import Context, Cost, InputError, SiteShape, State, StateSpec, Unsupported


class Hedgehog(Hybrid):
    """See the top of this file. State per head of a causal layer: F x (V + 1) float32, plus window and sinks as they
    came."""

    paper = "https://arxiv.org/abs/2402.04347"
    kinds = frozenset({"causal", "bidirectional", "joint"})

    class Config(HybridConfig):
        decay: Literal["none", "learned", "gated"] = Field(
            default="none", description="does the state fade: never, by a rate per feature, also by the key"
        )
        half_lives: tuple[PositiveFloat, PositiveFloat] = Field(
            default=(4.0, 1024.0), description="tokens; where fading starts: the features' span, even in logarithm"
        )
        radius: int = Field(default=0, ge=0, description="of a circle of patches: the window of images")

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        if config.radius and self.local:
            raise InputError("hedgehog: radius takes the place of window and sinks: set window: 0 and sinks: 0")
        self.circle = CircleBranch(config.radius, shape) if config.radius else None
        if config.decay == "none":
            return
        if shape.joint or config.radius:
            raise Unsupported("decay goes along a sequence, and these tokens stand on a grid: set decay: none")
        low, high = (math.log(n) for n in config.half_lives)
        lives_C = torch.linspace(low, high, self.map_q.columns).exp()  # the halves of a split map share theirs
        rate_F = (math.log(2) / lives_C).expm1().log().repeat(self.map_q.features // self.map_q.columns)
        self.rate_HF = nn.Parameter(rate_F.repeat(self.key_heads, 1))
        if not shape.causal:
            self.ordered = True
            self.right_HF = nn.Parameter(rate_F.repeat(self.key_heads, 1))
        if config.decay == "gated":
            self.gate_HKF = nn.Parameter(torch.zeros(self.key_heads, shape.key_dim, self.map_q.features))

    @property
    def exact(self) -> bool:
        return super().exact or self.config.radius > 0

    @property
    def needs_grid(self) -> bool:
        return self.shape.joint or self.config.radius > 0

    def masks(self, ctx: Context, like_BHTK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        if not self.config.radius:
            return super().masks(ctx, like_BHTK, rows)
        return ctx.visible(like_BHTK, rows), seen_in_circle(ctx, like_BHTK, self.config.radius, rows)

    # -------------------------------------------------------------------------------------------- the function
    def both(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Branches, State]:
        if state is None:
            state = self.empty_state(q_BHTK.shape[0], q_BHTK.device, k_BGTK.dtype)
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        if self.circle is not None:
            far, mass, _ = self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx, circle=self.circle.circle(ctx))
            return Branches(self.circle.two_sided(q_BHTK, k_BGTK, v_BGTV, ctx), far, mass), ()
        if self.shape.joint:
            text_T = beside_grid(ctx, q_BHTK)
            image_BT = ~text_T.expand(len(q_BHTK), -1) if ctx.valid_BT is None else ctx.valid_BT & ~text_T
            far, mass, _ = self._linear(q_lin, k_lin, v_BGTV, image_BT, ctx)
            mass = mass.masked_fill(text_T, 0)  # text has read everybody already
            return Branches(text_softmax(q_BHTK, k_BGTK, v_BGTV, ctx), far, mass), ()
        if self.local is None:
            far, mass, state = self._linear(
                q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx, state[:1], self._fading(k_lin, ctx)
            )
            return Branches(None, far, mass), state
        if not self.shape.causal:
            fading = self._fading(k_lin, ctx)
            far, mass, _ = self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx, fading=fading, gap=self.local.width)
            return Branches(self.local.two_sided(q_BHTK, k_BGTK, v_BGTV, ctx), far, mass), ()
        local = self.local(q_BHTK, k_BGTK, v_BGTV, ctx, state[1 : 1 + self._kept])
        rest = state[1 + self._kept :]
        far_k, kept_raw = local.far_k, ()
        if self.needs_rotary:  # the ring of rotated keys serves softmax, its twin of un-rotated keys the linear branch
            keys = torch.cat([rest[0].to(k_lin.dtype), k_lin], 2)
            T = k_lin.shape[2]
            far_k, kept_raw = keys[:, :, :T], (keys[:, :, T:],)
        fading = self._fading(k_lin, ctx)  # by the tokens of this call, while the keys are those that left the window
        far, mass, sums = self._linear(q_lin, far_k, local.far_v, local.far, ctx, state[:1], fading)
        return Branches(local, far, mass), (*sums, *local.kept, *kept_raw)

    def _linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        valid_BT: Tensor | None,
        ctx: Context,
        state: State = (),
        fading: tuple[Tensor, ...] = (),
        gap: int = 0,
        circle: Circle | None = None,
    ) -> tuple[Tensor, Tensor, State]:
        """(output_BHTV, mass_BHT, new sums). gap and circle, of bidirectional layers: nearer keys are the window's."""

        def features(columns: slice) -> Tensor:
            phi_k = self._map_keys(k[:, :, columns])
            return phi_k if valid_BT is None else phi_k * valid_BT[:, None, columns, None]

        if not (self.shape.causal or gap or circle or fading) and ctx.segments_BT is None:
            out = in_pieces(lambda columns: self.map_q(q[:, :, columns]), features, v)
            return out.numerator / (out.normaliser + self.config.eps)[..., None], out.normaliser, state
        sums, segments = state[0] if state else None, ctx.segments_BT
        if self.shape.causal and not fading:
            out = self._mapped(q, k, v, valid_BT, sums, segments)
            return out.output, out.mass, (out.state,)
        phi_q, phi_k = self.map_q(q), features(slice(None))
        if self.shape.causal:
            out = gated_linear(phi_q, phi_k, v, *fading, state=sums, segments_BT=segments)
            state = (out.state,)
        elif fading:
            left, right = fading
            out = gated_bidirectional(phi_q, phi_k, v, left, log_gate_right=right, gap=gap, segments_BT=segments)
        else:
            out = bidirectional(phi_q, phi_k, v, gap=gap, circle=circle, segments_BT=segments)
        return out.numerator / (out.normaliser + self.config.eps)[..., None], out.normaliser, state

    def _mapped(self, q, k, v, valid_BT, sums, segments_BT) -> MappedOutput:
        (w_q, b_q), (w_k, b_k) = self.map_q(None), (self.map_k or self.map_q)(None)
        return mapped_linear(
            q, k, v, self.map_q.name, (w_q, w_k), (b_q, b_k), key_heads=self.key_heads, valid_BT=valid_BT, state=sums,
            segments_BT=segments_BT, eps=self.config.eps,
        )  # fmt: skip

    def linear_alone(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        return self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx, fading=self._fading(k_lin, ctx))[0]

    def _fading(self, k_BGTK: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """Log gates broadcastable to [B, key heads, T, F], 0 at padding: of the past, in encoders also of what is on
        the right; none where nothing fades."""
        if self.config.decay == "none":
            return ()
        dtype = compute_dtype(k_BGTK)
        sides = (self.rate_HF,) if self.shape.causal else (self.rate_HF, self.right_HF)
        rates = [rate.to(dtype)[:, None] for rate in sides]
        if self.config.decay == "gated":
            more = self._for_key_heads(k_BGTK).to(dtype) @ self.gate_HKF.to(dtype)
            rates = [rate + more for rate in rates]
        gates = (-F.softplus(rate) for rate in rates)
        return tuple(g if ctx.valid_BT is None else g * ctx.valid_BT[:, None, :, None] for g in gates)

    # ------------------------------------------------------------------------------------------- the definition
    def far_weights(
        self, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context, seen_BTT: Tensor, gap: int, rows: slice
    ) -> Tensor:
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        phi_q, phi_k = self.map_q(q_lin[:, :, rows]), self._for_heads(self._map_keys(k_lin))
        gates = (self._for_heads(g[(None,) * (4 - g.ndim)]) for g in self._fading(k_lin, ctx))
        fading = [g.expand(-1, -1, phi_k.shape[2], -1) for g in gates]
        if not fading:
            return (phi_q @ phi_k.mT) * seen_BTT[:, None]
        right = fading[1] if len(fading) > 1 else None
        return gated_weights(phi_q, phi_k, fading[0], seen_BTT, right_BHTF=right, gap=gap, rows=rows)

    # ------------------------------------------------------------------------------------------------ accounts
    def state_spec(self) -> list[StateSpec]:
        s = self.shape
        if not s.causal:
            return []
        sums = (-1, self.key_heads, self.map_q.features, s.value_dim + 1)
        specs = [StateSpec("sums", sums, torch.float32, 1)]
        if self.local:
            specs += self.local.state_spec()
            if self.needs_rotary:
                shape = (-1, s.kv_heads, self.config.window, s.key_dim)
                specs.append(StateSpec("kept_raw_keys", shape, torch.bfloat16, 1))
        return specs

    def cost_of(self, grid: tuple[int, ...], others: int) -> Cost:
        tokens, s = math.prod(grid), self.shape
        if not s.joint:
            return self.cost(tokens + others)
        text = 2.0 * others * (2 * tokens + others) * (s.key_dim + s.value_dim) * s.heads
        return self.cost(tokens) + Cost(text, 8.0 * others * s.heads * (s.key_dim + s.value_dim))

    def cost(self, tokens: int) -> Cost:
        s, n, C, w = self.shape, self.map_q.features, 64, self.config.window
        maps = 2 * s.key_dim * self.map_q.columns * (s.heads + self.key_heads)
        state = 4 * n * (s.value_dim + 1) * s.heads
        inside = 2 * C * (n + s.value_dim) * s.heads
        if self.config.decay == "gated":
            maps += 2 * s.key_dim * n * self.key_heads
        near = 2 * (w + self.config.sinks) * (s.key_dim + s.value_dim) * s.heads
        if radius := self.config.radius:  # a grid as square as it gets; far keys around a tile are read one by one
            rows = max(1, math.isqrt(tokens))
            seen = pairs((rows, tokens // rows), radius, tokens % rows) / tokens
            near = 2 * seen * (s.key_dim + s.value_dim) * s.heads
            inside = 2 * min(tokens, one_by_one(radius)) * (n + s.value_dim) * s.heads
        elif not s.causal:  # one product each way, or with a window a scan from either side
            scan = w or self.config.decay != "none"
            state, inside, near = (2 * state, 2 * inside, 2 * near) if scan else (state, 0, 0)
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        return Cost(float(tokens * (maps + state + inside + near)), float(tokens * moved))
