"""No token mixing: every token reads only itself. The floor below which a "linear attention" is doing nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import RecurrentMixer
from linearize.types import Context, Cost, State, StateSpec


class NoMixing(RecurrentMixer):
    """o_t = v_t. 2510.05901 shows published hybrids whose linear branch is no better than this."""

    paper = "https://arxiv.org/abs/2510.05901"
    kinds = frozenset({"causal", "bidirectional", "joint"})

    def chunked(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        return v_BGTV.repeat_interleave(self.shape.group, 1).to(q_BHTK.dtype), state

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        B, H, T, _ = q_BHTK.shape
        return torch.eye(T, dtype=q_BHTK.dtype, device=q_BHTK.device)[rows].expand(B, H, -1, T)

    def state_spec(self) -> list[StateSpec]:
        return []

    def cost(self, tokens: int) -> Cost:
        return Cost(0.0, 8.0 * tokens * self.shape.heads * self.shape.value_dim)
