"""CLEAR: exact softmax over the circle of patches around each patch.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (2412.16112).

    patch q reads patch k where (y_q - y_k)^2 + (x_q - x_k)^2 < r^2

Tokens that are no patches (CLS, registers, text) read everybody and are read by everybody. Every parameter is
inherited, none is new: with r beyond the diagonal of the grid it is the teacher. In a video the circle is read in
every frame, or in those less than `frames` away. `down: d` (the authors' r8d4): patches also read the mean keys and
values of d x d patches, with learned weights that start at 1 / d^2. `proportional: L`, for images larger than the L
tokens of training: scores times sqrt(log T / log L).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.base import Mixer, MixerConfig
from linearize.mixers.patches import patch_grid, seen_in_circle, text_softmax
from linearize.ops._dispatch import compute_dtype
from linearize.ops._softmax import attend, merge
from linearize.ops.local2d import local2d_output, pairs
from linearize.ops.local2d.frames import frames
from linearize.ops.local2d.reference import circle
from linearize.types import Context, Cost, InputError, SiteShape, StateSpec, Unsupported


class Clear(Mixer):
    """Softmax over the patches less than `radius` away (193 of them at 8, 793 at 16), with the teacher's q, k, v."""

    paper = "https://arxiv.org/abs/2412.16112"
    kinds = frozenset({"bidirectional", "joint"})
    needs = frozenset({"grid"})
    refuses = {
        "LLM": "a circle of patches has no past: on text its like is the method window",
        "encoder": "text has no rows and columns: on text its like is the method window",
    }

    class Config(MixerConfig):
        radius: int = Field(default=8, ge=1, description="in patches; a neighbour at exactly this distance is not seen")
        frames: int | None = Field(default=None, ge=1, description="of a video: only those less than so many away")
        down: int | None = Field(default=None, ge=2, description="side of the squares of patches whose means all read")
        proportional: int | None = Field(default=None, ge=2, description="tokens of training, text among them")

    config: Config

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        if d := config.down:
            self.pool_HYX = nn.Parameter(torch.full((shape.heads, d, d), 1 / d**2))

    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        c, ctx = self.config, self._scaled(ctx, q_BHTK)
        flat = ctx.grid is None or len(ctx.grid) == 2
        if flat and c.down is None:
            near = {"grid": patch_grid(ctx, "clear"), "radius": c.radius, "scale": ctx.scale, "valid_BT": ctx.valid_BT}
            return local2d_output(q_BHTK, k_BGTK, v_BGTV, **near, prefix=ctx.prefix, suffix=ctx.suffix).to(q_BHTK.dtype)
        dtype = compute_dtype(q_BHTK, k_BGTK, v_BGTV)
        q, k, v = (self._for_heads(x.to(dtype)) for x in (q_BHTK, k_BGTK, v_BGTV))
        text = text_softmax(q, k, v, ctx)
        patches = slice(ctx.prefix, q.shape[2] - ctx.suffix)
        valid = None if ctx.valid_BT is None else ctx.valid_BT[:, patches]
        grid: tuple[int, int, int] = (1, *patch_grid(ctx, "clear")) if flat else ctx.grid  # type: ignore[assignment]
        own = (q[:, :, patches], k[:, :, patches], v[:, :, patches])
        reach = None if c.frames is None else c.frames - 1
        out, lse = frames(*own, grid=grid, radius=c.radius, reach=reach, scale=ctx.scale, valid_BT=valid)
        out, lse = merge(out, lse, text.output[:, :, patches], text.lse[:, :, patches])
        if c.down is not None:
            pooled = (self._pooled(x, grid) for x in own[1:])
            out, lse = merge(out, lse, *attend(own[0], *pooled, ctx.scale)[:2])
        rows = (text.output[:, :, : ctx.prefix], out, text.output[:, :, patches.stop :])
        return torch.cat(rows, 2).to(q_BHTK.dtype)

    def _for_heads(self, x_BGTK: Tensor) -> Tensor:
        return x_BGTK.repeat_interleave(self.shape.heads // x_BGTK.shape[1], 1)

    def _scaled(self, ctx: Context, like_BHTK: Tensor) -> Context:
        if self.config.proportional is None:
            return ctx
        grown = math.log(like_BHTK.shape[2]) / math.log(self.config.proportional)
        return replace(ctx, scale=ctx.scale * math.sqrt(grown))

    def _pooled(self, x_BHNK: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """The weighted means of squares of patches [B, H, N / d^2, K]. Raises InputError where d does not divide."""
        d = self.config.down
        assert d is not None
        if grid[1] % d or grid[2] % d:
            raise InputError(f"clear: down: {d} does not divide a grid of {grid[1]} x {grid[2]} patches")
        squares = x_BHNK.unflatten(2, (grid[0] * grid[1] // d, d, grid[2] // d, d))
        weights = self.pool_HYX.to(x_BHNK.dtype)[None, :, None, :, None, :, None]
        return (squares * weights).sum((3, 5)).flatten(2, 3)

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        if self.config.down is not None:
            raise Unsupported("clear with down has no map of tokens: its means are no tokens. Use losses on outputs")
        ctx = self._scaled(ctx, q_BHTK)
        hidden = ~self._seen(ctx, q_BHTK, rows)[:, None]
        scores = q_BHTK[:, :, rows] @ self._for_heads(k_BGTK).mT * ctx.scale
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0)

    def _seen(self, ctx: Context, like_BHTK: Tensor, rows: slice) -> Tensor:
        if ctx.grid is None or len(ctx.grid) == 2:
            return seen_in_circle(ctx, like_BHTK, self.config.radius, rows)
        count, height, width = ctx.grid
        time = torch.arange(count, device=like_BHTK.device)
        close = (time[:, None] - time).abs() < (self.config.frames or count)
        near = torch.kron(close, circle((height, width), self.config.radius, device=like_BHTK.device))
        near = torch.nn.functional.pad(near, (ctx.prefix, ctx.suffix, ctx.prefix, ctx.suffix), value=True)
        return ctx.visible(like_BHTK, rows) & near[rows]

    def state_spec(self) -> list[StateSpec]:
        return []

    def cost(self, tokens: int) -> Cost:
        """Of a grid as square as it gets; `cost_of` knows better."""
        rows = max(1, math.isqrt(tokens))
        return self.cost_of((rows, tokens // rows), tokens % rows)

    def cost_of(self, grid: tuple[int, ...], others: int) -> Cost:
        """Forward cost over one grid of patches and so many other tokens."""
        s = self.shape
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        count = grid[0] if len(grid) == 3 else 1
        reach = min(self.config.frames or count, count)
        times = count + 2 * sum(count - apart for apart in range(1, reach))  # pairs of frames
        tokens = math.prod(grid)
        seen = times * pairs((grid[-2], grid[-1]), self.config.radius) + others * (2 * tokens + others)
        seen += 0 if self.config.down is None else tokens * (tokens // self.config.down**2)
        flops = 2.0 * seen * (s.key_dim + s.value_dim) * s.heads
        return Cost(flops, float((tokens + others) * moved))
