"""Hedgehog: linear attention with learned, spiky feature maps, optionally beside an exact window.

Zhang et al., "The Hedgehog & the Porcupine" (2402.04347); hybrid form of LoLCATs (2410.10254) equation 7.

    y_t = phi_q(q_t) S_t / phi_q(q_t) z_t,   S_t = sum_{s <= t} phi_k(k_s) v_s^T,   z_t = sum_{s <= t} phi_k(k_s)

and in encoders the same with sums over all s. With `window: w` the last w tokens (in encoders: those less than w away
on either side; and `sinks: n` first ones) are exact softmax and the sums run over all others.
Ours: sinks are kept out of the state; the rule "lse"; maps shared per key/value head; the linear branch without RoPE;
the normaliser is the state's last column, in float32; padding is zeroed after the map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.parts import Branches, Hybrid, HybridConfig
from linearize.ops.bidirectional import bidirectional
from linearize.ops.linear import linear
from linearize.types import Context, Cost, State, StateSpec


class Hedgehog(Hybrid):
    """See the top of this file. State per head of a causal layer: F x (V + 1) float32, plus window and sinks as they
    came."""

    paper = "https://arxiv.org/abs/2402.04347"
    Config = HybridConfig

    # -------------------------------------------------------------------------------------------- the function
    def both(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Branches, State]:
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

    def linear_alone(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        return self._linear(q_lin, k_lin, v_BGTV, ctx.valid_BT, ctx)[0]

    # ------------------------------------------------------------------------------------------- the definition
    def far_weights(
        self, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context, seen_BTT: Tensor, gap: int, rows: slice
    ) -> Tensor:
        q_lin, k_lin = self._unrotated(q_BHTK, k_BGTK, ctx)
        phi_k = self._for_heads(self._map_keys(k_lin))
        return (self.map_q(q_lin[:, :, rows]) @ phi_k.mT) * seen_BTT[:, None]

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
