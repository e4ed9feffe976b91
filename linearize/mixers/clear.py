"""CLEAR: exact softmax over the circle of patches around each patch.

Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (2412.16112).

    patch q reads patch k where (y_q - y_k)^2 + (x_q - x_k)^2 < r^2

Tokens that are no patches (CLS, registers, text) read everybody and are read by everybody. Every parameter is
inherited, none is new: with r beyond the diagonal of the grid it is the teacher.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from linearize.mixers.base import Mixer, MixerConfig
from linearize.mixers.patches import patch_grid, seen_in_circle
from linearize.ops.local2d import local2d_output, pairs
from linearize.types import Context, Cost, StateSpec


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

    config: Config

    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        grid = patch_grid(ctx, "clear")
        out = local2d_output(
            q_BHTK,
            k_BGTK,
            v_BGTV,
            grid=grid,
            radius=self.config.radius,
            scale=ctx.scale,
            prefix=ctx.prefix,
            suffix=ctx.suffix,
            valid_BT=ctx.valid_BT,
        )
        return out.to(q_BHTK.dtype)

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        hidden = ~seen_in_circle(ctx, q_BHTK, self.config.radius, rows)[:, None]
        scores = q_BHTK[:, :, rows] @ k_BGTK.repeat_interleave(self.shape.group, 1).mT * ctx.scale
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0)

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
        flops = 2.0 * pairs((grid[0], grid[1]), self.config.radius, others) * (s.key_dim + s.value_dim) * s.heads
        return Cost(flops, float((math.prod(grid) + others) * moved))
