"""Sliding window with attention sinks, no parameters and no training: the baseline a linear branch has to beat.

StreamingLLM-style mask (Xiao et al., 2309.17453); as a zero-token baseline for linearisation: 2608.28444.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from linearize.mixers.base import RecurrentMixer
from linearize.mixers.parts import LocalBranch, LocalConfig, local_mask
from linearize.types import Context, Cost, SiteShape, State, StateSpec


class Window(RecurrentMixer):
    """Exact softmax over the last `window` tokens and the first `sinks` ones; everything else is forgotten. On
    bidirectional layers: over all tokens less than `window` columns away, on both sides, without sinks."""

    paper = "https://arxiv.org/abs/2309.17453"
    kinds = frozenset({"causal", "bidirectional"})
    refuses = dict.fromkeys(
        ("ViT", "DiT"), "along the line of patches a window is no neighbourhood: on images its like is the method clear"
    )

    class Config(LocalConfig):
        window: int = Field(default=64, ge=1)
        sinks: int = Field(default=4, ge=0)

    config: Config

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        self.local = LocalBranch(config, shape)

    def chunked(
        self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, state: State
    ) -> tuple[Tensor, State]:
        if not self.shape.causal:
            return self.local.two_sided(q_BHTK, k_BGTK, v_BGTV, ctx).output.to(q_BHTK.dtype), state
        local = self.local(q_BHTK, k_BGTK, v_BGTV, ctx, state)
        return local.output.to(q_BHTK.dtype), local.kept

    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        _, local_BTT = local_mask(ctx, q_BHTK, self.config.window, self.config.sinks, rows)
        scores = q_BHTK[:, :, rows] @ k_BGTK.repeat_interleave(self.shape.group, 1).mT * ctx.scale
        hidden = ~local_BTT[:, None]
        return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0)

    def state_spec(self) -> list[StateSpec]:
        return self.local.state_spec() if self.shape.causal else []

    def cost(self, tokens: int) -> Cost:
        s, c = self.shape, self.config
        seen = c.window + c.sinks if s.causal else 2 * c.window - 1
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        return Cost(2.0 * tokens * seen * (s.key_dim + s.value_dim) * s.heads, float(tokens * moved))
