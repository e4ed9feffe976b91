"""LAWCAT: short convolutions on q and k, no RoPE, and a state that fades by learned gates; optionally beside a window.

Liu et al., "LAWCAT" (2509.18467); the gated state is GLA's (2312.06635).

    y_t = phi_q(c_q(q)_t) S_t / phi_q(c_q(q)_t) z_t,   [S, z]_t = diag(a_t) [S, z]_{t-1} + phi_k(c_k(k)_t) [v_t, 1]^T
    log a_t = logsigmoid(W_2 W_1 x_t + b) / 16,   c: causal depthwise convolution over 4 tokens,   x: hidden states

In encoders both directions are added, a token's own key counted once; the convolutions read the tokens before in both.
With `window` the last tokens (and `sinks`) are exact softmax; a key enters the state, unfaded, as it leaves the window.
Ours: gates are started by their half-life; W_1 and W_2 for each key head, scaled so that one learning rate serves them
and the maps; convolutions start at the identity; options "kv" (a state per key/value head), "head" (a gate per head),
"constant" (retention with learned rates) and "open" (none); the rule "lse".
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.parts import Branches, Hybrid, HybridConfig
from linearize.ops._dispatch import compute_dtype
from linearize.ops.gated_linear import gated_bidirectional, gated_linear, gated_weights
from linearize.types import Context, Cost, SiteShape, State, StateSpec, Unsupported

#: the paper's divisor of logsigmoid, which keeps gates near 1
_SLOW = 16
#: tokens that are mapped, gated and summed at a time where no gradients are wanted
_PIECE = 256
HalfLife = Annotated[float, Field(gt=0)]


class Lawcat(Hybrid):
    """See the top of this file. State per key head of a causal layer: F x (V + 1) float32; un-rotated q and k of the
    convolution's last tokens (k: and of the window) as they came; window and sinks."""

    paper = "https://arxiv.org/abs/2509.18467"
    needs = frozenset({"hidden"})
    ordered = True

    class Config(HybridConfig):
        tie: bool = Field(default=True, description="one map for q and k")
        rope: Literal["keep", "undo", "auto"] = Field(default="auto", description="rotate the linear branch's q and k?")
        conv: int = Field(default=4, ge=1, le=64, description="tokens that a convolution reads; 1: none")
        gate: Literal["hidden", "constant", "open"] = Field(default="hidden", description="what the gates depend on")
        per: Literal["feature", "head"] = Field(default="feature", description="a gate for each feature or each head")
        rank: int = Field(default=16, ge=1, description="inner width of the gates' map")
        half_life: HalfLife | tuple[HalfLife, HalfLife] = Field(
            default=2048,
            description="tokens until half is forgotten, at the start; the paper: 16. Two: a span over features, or "
            "heads, even in logarithm",
        )

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        self.taps, self.gating = config.conv, config.gate
        H, J, K = shape.heads, self.key_heads, shape.key_dim
        if self.taps > 1:
            self.conv_q_HKC, self.conv_k_JKC = (nn.Parameter(_last_tap(n, K, self.taps)) for n in (H, J))
        gates = 1 if config.per == "head" else self.map_q.features
        if self.gating != "open":
            self.gate_bias_JF = nn.Parameter(self._start(config.half_life, J, gates))
        if self.gating == "hidden":
            self.gate_down_JDR = nn.Parameter(_waves(J, shape.width, config.rank))
            self.gate_up_JRF = nn.Parameter(0.01 * _waves(J, config.rank, gates))

    def _start(self, half_life: float | tuple[float, float], heads: int, gates: int) -> Tensor:
        """The bias [heads, gates] of which logsigmoid(b) / 16 = -log 2 / half-life."""
        low, high = half_life if isinstance(half_life, tuple) else (half_life, half_life)
        columns = heads if gates == 1 else self.map_q.columns  # the halves of a split map share theirs
        lives = torch.linspace(math.log(low), math.log(high), columns, dtype=torch.float64).exp()
        kept = -_SLOW * math.log(2) / lives
        bias = (kept - (-kept.expm1()).log()).float()
        return bias[:, None] if gates == 1 else bias.repeat(heads, gates // columns)

    # -------------------------------------------------------------------------------------------- the function
    def chunked(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        T, whole = q_BHTK.shape[2], torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or T <= _PIECE or self.local or not self.shape.causal or ctx.segments_BT is not None:
            return super().chunked(q_BHTK, k_BGTK, v_BGTV, ctx, state)
        outs = []  # a piece's features and gates stay in a CPU's cache, where those of a long text would not
        for start in range(0, T, _PIECE):
            part = slice(start, start + _PIECE)
            out, state = super().chunked(
                q_BHTK[:, :, part], k_BGTK[:, :, part], v_BGTV[:, :, part], ctx.take(part), state
            )
            outs.append(out)
        return torch.cat(outs, 2), state

    def both(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State | None = None
    ) -> tuple[Branches, State]:
        if state is None:
            state = self.empty_state(q_BHTK.shape[0], q_BHTK.device, k_BGTK.dtype)
        q, k = self._unrotated(q_BHTK, k_BGTK, ctx)
        if not self.shape.causal:
            gap = self.local.width if self.local else 0
            far, mass, _ = self._linear(*self._mapped(q, k, ctx), v_BGTV, ctx.valid_BT, ctx, gap=gap)
            return Branches(self.local.two_sided(q_BHTK, k_BGTK, v_BGTV, ctx) if self.local else None, far, mass), ()
        local = self.local(q_BHTK, k_BGTK, v_BGTV, ctx, state[1 : 1 + self._kept]) if self.local else None
        phi_q, phi_k, kept = self._mapped_after(q, k, ctx, state[1 + self._kept :])
        v, counts = (v_BGTV, ctx.valid_BT) if local is None else (local.far_v, local.far)
        far, mass, sums = self._linear(phi_q, phi_k, v, counts, ctx, state[0])
        return Branches(local, far, mass), (sums, *(local.kept if local else ()), *kept)

    def linear_alone(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        phi_q, phi_k = self._mapped(*self._unrotated(q_BHTK, k_BGTK, ctx), ctx)
        return self._linear(phi_q, phi_k, v_BGTV, ctx.valid_BT, ctx)[0]

    def _linear(
        self,
        phi_q: Tensor,
        phi_k: Tensor,
        v: Tensor,
        counts_BT: Tensor | None,
        ctx: Context,
        sums: Tensor | None = None,
        gap: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(output_BHTV, mass_BHT, new sums). counts_BT: keys that are real and nobody else's. gap, of bidirectional
        layers: nearer keys are the window's."""
        if counts_BT is not None:
            phi_k = phi_k * counts_BT[:, None, :, None]
        gates = self.log_gates(ctx, phi_q)
        if self.shape.causal:
            out = gated_linear(phi_q, phi_k, v, gates, state=sums, segments_BT=ctx.segments_BT)
            sums = out.state
        else:
            out = gated_bidirectional(phi_q, phi_k, v, gates, gap=gap, segments_BT=ctx.segments_BT)
            sums = phi_q.new_zeros(0)
        return out.numerator / (out.normaliser + self.config.eps)[..., None], out.normaliser, sums

    def log_gates(self, ctx: Context, like_BHTK: Tensor) -> Tensor:
        """log a_t, broadcastable to [B, J, T, F], 0 at padding. Raises Unsupported where the layer's input is not
        known."""
        dtype = compute_dtype(like_BHTK)
        if self.gating == "open":
            return like_BHTK.new_zeros(1, 1, 1, 1, dtype=dtype)
        logits = self.gate_bias_JF.to(dtype)[None, :, None]
        if self.gating == "hidden":
            x = ctx.hidden_BTD
            if x is None or x.ndim != 3 or x.shape[1] != like_BHTK.shape[2]:
                raise Unsupported("lawcat's gates need the layer's input, which is not known here: set gate: constant")
            down, up = self.gate_down_JDR.to(dtype), self.gate_up_JRF.to(dtype)
            low_BTJR = (x.to(dtype) @ down.transpose(0, 1).flatten(1)).unflatten(
                -1, down.shape[::2]
            )  # heads in one product
            logits = logits + low_BTJR.transpose(1, 2) @ (up / math.sqrt(down.shape[1] * up.shape[1]))
        gates = F.logsigmoid(logits) / _SLOW
        return gates if ctx.valid_BT is None else torch.where(ctx.valid_BT[:, None, :, None], gates, 0)

    def _mapped(self, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Features of q and k of a whole sequence."""
        if self.taps > 1:
            before = (0, 0, self.taps - 1, 0)
            q_BHTK, k_BGTK = (F.pad(_real(x, ctx), before) for x in (q_BHTK, k_BGTK))
        return self._features(q_BHTK, k_BGTK, ctx, self.taps - 1)

    def _mapped_after(self, q: Tensor, k: Tensor, ctx: Context, kept: State) -> tuple[Tensor, Tensor, State]:
        """(features of q, features of the keys that leave the window just then, the last q and k) of one call."""
        T = k.shape[2]
        if not kept:
            return *self._features(q, k, ctx, 0), ()
        keys = torch.cat([kept[0].to(k.dtype), _real(k, ctx)], 2)
        new = [keys[:, :, T:]]
        if self.taps > 1:
            q = torch.cat([kept[1].to(q.dtype), _real(q, ctx)], 2)
            new.append(q[:, :, T:])
        return *self._features(q, keys[:, :, : T + self.taps - 1], ctx, kept[0].shape[2]), tuple(new)

    def _features(self, q: Tensor, k: Tensor, ctx: Context, before: int) -> tuple[Tensor, Tensor]:
        """Features of q and k after their convolutions. q begins taps - 1 columns before the call, k `before`."""
        k = self._for_key_heads(k)
        if self.taps > 1:
            documents = ctx.segments_BT
            if documents is not None:  # what is kept belongs to the first document of a call
                documents = torch.cat([documents[:, :1].expand(-1, before), documents], 1)
            q = _convolve(q, self.conv_q_HKC, None if documents is None else documents[:, before - self.taps + 1 :])
            k = _convolve(k, self.conv_k_JKC, None if documents is None else documents[:, : k.shape[2]])
        return self.map_q(q), (self.map_k or self.map_q)(k)

    # ------------------------------------------------------------------------------------------- the definition
    def far_weights(
        self, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context, seen_BTT: Tensor, gap: int, rows: slice
    ) -> Tensor:
        phi_q, phi_k = self._mapped(*self._unrotated(q_BHTK, k_BGTK, ctx), ctx)
        gates = self.log_gates(ctx, phi_q)
        gates = gates.expand(*gates.shape[:2], phi_q.shape[2], gates.shape[3])
        gates = self._for_heads(gates) if gates.shape[1] > 1 else gates
        return gated_weights(phi_q[:, :, rows], self._for_heads(phi_k), gates, seen_BTT, gap=gap, rows=rows)

    # ------------------------------------------------------------------------------------------------ accounts
    def state_spec(self) -> list[StateSpec]:
        s, before = self.shape, self.config.window + self.taps - 1
        if not s.causal:
            return []
        specs = [StateSpec("sums", (-1, self.key_heads, self.map_q.features, s.value_dim + 1), torch.float32, 1)]
        specs += self.local.state_spec() if self.local else []
        if before:
            specs.append(StateSpec("kept_raw_keys", (-1, s.kv_heads, before, s.key_dim), torch.bfloat16, 1))
        if self.taps > 1:
            specs.append(StateSpec("kept_raw_queries", (-1, s.heads, self.taps - 1, s.key_dim), torch.bfloat16, 1))
        return specs

    def cost(self, tokens: int) -> Cost:
        s, N, C, w = self.shape, self.map_q.features, 64, self.config.window
        H, J = s.heads, self.key_heads
        maps = 2 * s.key_dim * (self.map_q.columns + self.taps) * (H + J)
        gates = sum(2 * p.numel() for name, p in self.named_parameters() if name.startswith("gate_"))
        state = 4 * N * (s.value_dim + 1) * H
        inside = 2 * C * (N + s.value_dim) * H
        fading = 2 * int(math.log2(C)) * N * (H + J)
        near = 2 * (w + self.config.sinks) * (s.key_dim + s.value_dim) * H
        scan = state + inside + fading
        if not s.causal:
            scan, near = 2 * scan, 2 * near
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim + s.width)
        return Cost(float(tokens * (maps + gates + scan + near)), float(tokens * moved))


def _last_tap(heads: int, channels: int, taps: int) -> Tensor:
    """Convolutions that read the token itself alone."""
    return F.pad(torch.zeros(heads, channels, taps - 1), (0, 1), value=1.0)


def _waves(heads: int, width: int, rank: int) -> Tensor:
    """[heads, width, rank]: orthogonal directions of unit size, its own for each head: cosines, for want of chance."""
    place, rate = torch.arange(width) + 0.5, torch.arange(1, heads * rank + 1)
    waves = math.sqrt(2) * torch.cos(math.pi / width * place[:, None] * rate)
    return waves.unflatten(1, (heads, rank)).transpose(0, 1).contiguous()


def _real(x_BHTK: Tensor, ctx: Context) -> Tensor:
    """Zeros at padding: to a convolution it is what is before the first token."""
    return x_BHTK if ctx.valid_BT is None else x_BHTK.masked_fill(~ctx.valid_BT[:, None, :, None], 0)


def _convolve(x_BHSK: Tensor, weight_HKC: Tensor, documents_BS: Tensor | None) -> Tensor:
    """Causal depthwise convolution: [B, H, S - C + 1, K], in float32 (float64 stays). No token reads another
    document's."""
    C = weight_HKC.shape[-1]
    x, T = x_BHSK.to(compute_dtype(x_BHSK)), x_BHSK.shape[2] - C + 1
    *before, own_HK = weight_HKC.to(x.dtype).unbind(-1)
    out = x[:, :, C - 1 :] * own_HK[:, None]
    for tap, weight_HK in enumerate(before):
        part = x[:, :, tap : tap + T]
        if documents_BS is not None:
            same_BT = documents_BS[:, tap : tap + T] == documents_BS[:, C - 1 :]
            part = part * same_BT[:, None, :, None]
        out = torch.addcmul(out, part, weight_HK[:, None])
    return out
