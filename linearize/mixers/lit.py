"""LiT: linear attention with few heads, and a depthwise convolution over the grid of patches.

Wang et al., "LiT: Delving into a Simplified Linear Diffusion Transformer for Image Generation" (2501.12976).

    o_i = phi(q_i) S / phi(q_i) z + conv(v)_i,   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j),   phi = relu

The teacher's heads are regrouped into fewer, wider ones: the same columns of q, k, v and o side by side, so that
nothing is re-initialised and S has more of a rank. Ours: the convolution starts at zero; sums are float32; the options.
Where text and an image stand in one sequence, text rows and columns stay softmax, as in MM-EDiT (2503.16726): a patch
answers N / (N + T) of the above, over the N patches, and T / (N + T) of softmax over the T tokens of text. In a video
the convolution is of each frame.
InLine (2412.06590): o_i = s/N phi(q_i) S + (1 - s/N phi(q_i) z) mean(v), weights that add up to one unforced.
Centred q and k, and their instance norm: T5 (2605.02772).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from linearize.mixers.base import Mixer, MixerConfig
from linearize.mixers.parts import FeatureMap, FeatureMapName
from linearize.mixers.patches import beside_grid, patch_grid, text_softmax
from linearize.ops._dispatch import compute_dtype
from linearize.ops.bidirectional import in_pieces
from linearize.types import Context, Cost, InputError, SiteShape, StateSpec


class LiT(Mixer):
    """Linear attention over regrouped heads plus a depthwise convolution on v. Tokens that are no patches take part in
    the attention and pass the convolution by."""

    paper = "https://arxiv.org/abs/2501.12976"
    kinds = frozenset({"bidirectional", "joint"})
    needs = frozenset({"grid"})
    refuses = {
        "LLM": "its convolution reads the patches around each one, and text has none: use hedgehog",
        "encoder": "its convolution reads the patches around each one, and text has none: use hedgehog",
    }

    class Config(MixerConfig):
        heads: int | None = Field(default=None, ge=1, description="after regrouping; None: a quarter of the teacher's")
        feature_map: FeatureMapName = "relu"
        kernel: int = Field(default=5, ge=1, description="side of the convolution, odd")
        normaliser: Literal["sum", "inline"] = "sum"
        start: Literal["inherit", "afresh"] = Field(
            default="inherit",
            description="q, k, v, o of the module: the teacher's, or new as in the paper",
        )
        norm: Literal["none", "center", "instance"] = Field(default="none", description="of q and k over the tokens")
        eps: float = Field(default=1e-6, gt=0)

    config: Config

    def __init__(self, shape: SiteShape, config: Config) -> None:
        super().__init__(shape, config)
        c, H, V = config, shape.heads, shape.value_dim
        self.heads = c.heads or min(h for h in range(1, H + 1) if H % h == 0 and 4 * h >= H)
        if H % self.heads:
            raise InputError(f"lit: {H} heads cannot be regrouped into {self.heads}; heads: one of {_divisors(H)}")
        if c.kernel % 2 == 0:
            raise InputError(f"lit: kernel: {c.kernel} has no middle; use {c.kernel + 1}")
        self.joined = H // self.heads
        self.map_q = FeatureMap(c.feature_map, self.heads, shape.key_dim * self.joined)
        self.map_k = FeatureMap(c.feature_map, self.heads, shape.key_dim * self.joined)
        self.filter_HVYX = nn.Parameter(torch.zeros(H, V, c.kernel, c.kernel))
        self.bias_HV = nn.Parameter(torch.zeros(H, V))

    @property
    def starts_afresh(self) -> bool:
        return self.config.start == "afresh"

    @property
    def signed(self) -> bool:
        return self.config.normaliser == "inline"

    # -------------------------------------------------------------------------------------------- the function
    def parallel(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        return (self._joint if self.shape.joint else self._patches)(q_BHTK, k_BGTK, v_BGTV, ctx)

    def _patches(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        grid = _grid(ctx)
        v_BHTV = self._for_heads(v_BGTV.to(compute_dtype(q_BHTK, v_BGTV)))
        if ctx.valid_BT is not None:
            v_BHTV = v_BHTV * ctx.valid_BT[:, None, :, None]
        out = self._attention(q_BHTK, k_BGTK, v_BHTV, ctx).unflatten(3, (self.joined, -1)).transpose(2, 3).flatten(1, 2)
        patches = slice(ctx.prefix, v_BHTV.shape[2] - ctx.suffix)
        near = F.pad(self._convolution(v_BHTV[:, :, patches], grid), (0, 0, ctx.prefix, ctx.suffix))
        return (out + near).to(q_BHTK.dtype)

    def _joint(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> Tensor:
        text = text_softmax(q_BHTK, k_BGTK, v_BGTV, ctx).output
        image, patches = self._image(ctx, q_BHTK.shape[2])
        near = self._patches(*(x[:, :, patches] for x in (q_BHTK, k_BGTK, v_BGTV)), image)
        share = self._share(ctx, q_BHTK)
        out = share * near.to(text.dtype) + (1 - share) * text[:, :, patches]
        rows = (text[:, :, : patches.start], out, text[:, :, patches.stop :])
        return torch.cat(rows, 2).to(q_BHTK.dtype)

    def _image(self, ctx: Context, tokens: int) -> tuple[Context, slice]:
        """The call of the patches alone, and their columns."""
        patches = slice(ctx.prefix, tokens - ctx.suffix)
        valid = None if ctx.valid_BT is None else ctx.valid_BT[:, patches]
        return replace(ctx, valid_BT=valid, prefix=0, suffix=0), patches

    def _share(self, ctx: Context, like_BHTK: Tensor) -> Tensor:
        """N / (N + T), of real tokens: [B or 1, 1, 1, 1]."""
        beside_T, dtype = beside_grid(ctx, like_BHTK), compute_dtype(like_BHTK)
        real_BT = torch.ones_like(beside_T)[None] if ctx.valid_BT is None else ctx.valid_BT
        share_B = (real_BT & ~beside_T).sum(1) / real_BT.sum(1).clamp(min=1)
        return share_B.to(dtype)[:, None, None, None]

    def _attention(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BHTV: Tensor, ctx: Context) -> Tensor:
        """[B, heads, T, joined * V]"""
        q, k, v = self._normed(q_BHTK, ctx), self._normed(k_BGTK, ctx), self._regroup(v_BHTV)
        out = in_pieces(lambda part: self._queries(q, part), lambda part: self._keys(k, ctx, part), v)
        if self.config.normaliser == "sum":
            return out.numerator / (out.normaliser + self.config.eps)[..., None]
        count, gain = self._count(ctx, v), self._gain(ctx, v)
        mean = v.sum(2, keepdim=True) / count
        return gain * out.numerator + (1 - gain * out.normaliser[..., None]) * mean

    def _queries(self, q_BHTK: Tensor, part: slice) -> Tensor:
        """Features of regrouped heads at the columns of `part`, [B, heads, T, F]."""
        return self.map_q(self._regroup(q_BHTK[:, :, part]))

    def _keys(self, k_BGTK: Tensor, ctx: Context, part: slice) -> Tensor:
        """The same of keys; zero at those that are padding."""
        phi_k = self.map_k(self._regroup(self._for_heads(k_BGTK[:, :, part])))
        return phi_k if ctx.valid_BT is None else phi_k * ctx.valid_BT[:, None, part, None]

    def _normed(self, x_BHTK: Tensor, ctx: Context) -> Tensor:
        if self.config.norm == "none":
            return x_BHTK
        x_BHTK = x_BHTK.to(compute_dtype(x_BHTK))
        real = 1.0 if ctx.valid_BT is None else ctx.valid_BT[:, None, :, None]
        count = self._count(ctx, x_BHTK)
        x = x_BHTK - (x_BHTK * real).sum(2, keepdim=True) / count
        if self.config.norm == "center":
            return x
        return x / ((x**2 * real).sum(2, keepdim=True) / count + 1.0).sqrt()  # the paper's own eps is that large

    def _count(self, ctx: Context, like_BHTV: Tensor) -> Tensor:
        """Real tokens, [B or 1, 1, 1, 1]."""
        if ctx.valid_BT is None:
            return like_BHTV.new_tensor(like_BHTV.shape[2]).view(1, 1, 1, 1)
        return ctx.valid_BT.sum(1).to(like_BHTV.dtype).view(-1, 1, 1, 1)

    def _gain(self, ctx: Context, like_BHTV: Tensor) -> Tensor:
        return ctx.scale / self._count(ctx, like_BHTV)

    def _for_heads(self, x_BGTV: Tensor) -> Tensor:
        return x_BGTV.repeat_interleave(self.shape.group, 1) if self.shape.group > 1 else x_BGTV

    def _regroup(self, x_BHTV: Tensor) -> Tensor:
        """`joined` heads become one with all of their columns."""
        return x_BHTV.unflatten(1, (self.heads, self.joined)).transpose(2, 3).flatten(3)

    def _convolution(self, v_BHNV: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Over the patches of each frame, row by row in and out: [B, H, N, V]."""
        B, H, N, V = v_BHNV.shape
        image = v_BHNV.unflatten(2, (grid[0], -1)).permute(0, 2, 1, 4, 3).reshape(B * grid[0], H * V, *grid[1:])
        weight, bias = self.filter_HVYX.to(image.dtype).flatten(0, 1)[:, None], self.bias_HV.to(image.dtype).flatten()
        out = F.conv2d(image, weight, bias, padding=self.config.kernel // 2, groups=H * V)
        return out.view(B, grid[0], H, V, -1).permute(0, 2, 1, 4, 3).reshape(B, H, N, V)

    # ------------------------------------------------------------------------------------------- the definition
    def dense(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        if self.shape.joint:
            return self._joint_dense(q_BHTK, k_BGTK, v_BGTV, ctx, rows)
        return self._patches_dense(q_BHTK, k_BGTK, ctx, rows)

    def _patches_dense(self, q_BHTK: Tensor, k_BGTK: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        phi_q = self._queries(self._normed(q_BHTK, ctx), slice(None))
        phi_k = self._keys(self._normed(k_BGTK, ctx), ctx, slice(None))
        visible_BTT = ctx.visible(q_BHTK, rows)[:, None]
        weights = (phi_q[:, :, rows] @ phi_k.mT) * visible_BTT
        total = weights.sum(-1, keepdim=True)
        if self.config.normaliser == "sum":
            weights = weights / (total + self.config.eps)
        else:
            gain, count = self._gain(ctx, weights), self._count(ctx, weights)
            weights = gain * weights + (1 - gain * total) / count * visible_BTT
        return weights.repeat_interleave(self.joined, 1)

    def _joint_dense(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, rows: slice) -> Tensor:
        visible_BTT = ctx.visible(q)[:, None]
        beside_T, share = beside_grid(ctx, q), self._share(ctx, q)
        scores = q @ self._for_heads(k).mT * ctx.scale
        low = torch.finfo(scores.dtype).min
        seen = visible_BTT & (beside_T[:, None] | beside_T)  # pairs of which one at least is text
        weights = scores.masked_fill(~seen, low).softmax(-1) * seen
        image, patches = self._image(ctx, q.shape[2])
        near = self._patches_dense(q[:, :, patches], k[:, :, patches], image)
        weights[:, :, patches] *= 1 - share
        weights[:, :, patches, patches] += share * near
        return weights[:, :, rows]

    def beside(self, v_BGTV: Tensor, ctx: Context) -> Tensor:
        if self.shape.joint:
            image, patches = self._image(ctx, v_BGTV.shape[2])
            near = self._share(ctx, v_BGTV) * self._patches_beside(v_BGTV[:, :, patches], image)
            return F.pad(near, (0, 0, ctx.prefix, ctx.suffix))
        return self._patches_beside(v_BGTV, ctx)

    def _patches_beside(self, v_BGTV: Tensor, ctx: Context) -> Tensor:
        frames, rows, columns = _grid(ctx)
        v = v_BGTV.repeat_interleave(self.shape.group, 1)
        if ctx.valid_BT is not None:
            v = v * ctx.valid_BT[:, None, :, None]
        out, reach = torch.zeros_like(v), self.config.kernel // 2
        for i in range(frames * rows * columns):
            frame, place = divmod(i, rows * columns)
            y, x = divmod(place, columns)
            out[:, :, ctx.prefix + i] += self.bias_HV
            for b in range(max(0, y - reach), min(rows, y + reach + 1)):
                for a in range(max(0, x - reach), min(columns, x + reach + 1)):
                    tap_HV = self.filter_HVYX[:, :, b - y + reach, a - x + reach]
                    out[:, :, ctx.prefix + i] += tap_HV * v[:, :, ctx.prefix + (frame * rows + b) * columns + a]
        return out

    # ------------------------------------------------------------------------------------------------ accounts
    def state_spec(self) -> list[StateSpec]:
        return []

    def cost(self, tokens: int) -> Cost:
        s, wide, features = self.shape, self.shape.value_dim * self.joined, self.map_q.features
        maps = 4 * s.key_dim * self.joined * self.map_q.columns * self.heads
        maps = maps if any(True for _ in self.map_q.parameters()) else 0
        sums = 4 * features * (wide + 1) * self.heads
        convolution = 2 * self.config.kernel**2 * s.heads * s.value_dim
        moved = 4 * (2 * s.heads * s.key_dim + 2 * s.heads * s.value_dim)
        return Cost(float(tokens * (maps + sums + convolution)), float(tokens * moved))

    def cost_of(self, grid: tuple[int, ...], others: int) -> Cost:
        """Forward cost over one grid of patches and so many other tokens."""
        tokens, s = math.prod(grid), self.shape
        if not s.joint:
            return self.cost(tokens + others)
        text = 2.0 * others * (2 * tokens + others) * (s.key_dim + s.value_dim) * s.heads
        return self.cost(tokens) + Cost(text, 0.0)


def _grid(ctx: Context) -> tuple[int, int, int]:
    """(frames, rows, columns) of this call's patches; an image is one frame."""
    if ctx.grid is not None and len(ctx.grid) == 3:
        return ctx.grid[0], ctx.grid[1], ctx.grid[2]
    return 1, *patch_grid(ctx, "lit")


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
