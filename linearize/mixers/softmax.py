"""The identity: the family's own softmax, called unchanged. The first test of every family (difference 0.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import Mixer
from linearize.types import Context, Cost, StateSpec


class Softmax(Mixer):
    """o = what the teacher computes, with its soft-cap, window, sinks, dropout and its own growing cache."""

    paper = "https://arxiv.org/abs/1706.03762"
    kinds = frozenset({"causal", "bidirectional", "joint"})
    needs = frozenset({"mask"})

    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        assert ctx.teacher is not None
        return ctx.teacher()

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        scores = q_BHTK[:, :, rows] @ k_BGTK.repeat_interleave(self.shape.group, 1).mT * ctx.scale
        seen = ctx.visible(q_BHTK, rows)[:, None]
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~seen, lowest).softmax(-1).masked_fill(~seen, 0)

    def state_spec(self) -> list[StateSpec]:
        return []

    def state_bytes(self, tokens: int) -> int:
        return self.shape.kv_bytes(tokens)

    def cost(self, tokens: int) -> Cost:
        s = self.shape
        seen = (tokens + 1) / 2 if s.causal else tokens
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        return Cost(2.0 * tokens * seen * (s.key_dim + s.value_dim) * s.heads, float(tokens * moved))
