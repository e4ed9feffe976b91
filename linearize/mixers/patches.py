"""Parts of methods for images: the grid of a call, softmax over a circle of its patches, and over what is beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._dispatch import compute_dtype
from linearize.ops._softmax import attend
from linearize.ops.bidirectional import Circle
from linearize.ops.local2d import local2d
from linearize.ops.local2d.reference import circle
from linearize.ops.window import WindowOutput
from linearize.types import Context, InputError, SiteShape, Unsupported


def patch_grid(ctx: Context, method: str) -> tuple[int, int]:
    """(rows, columns) of this call's patches. Raises InputError where it has none, or where one row of the batch holds
    several images."""
    if ctx.grid is None or len(ctx.grid) != 2:
        raise InputError(f"{method}: this call has no grid of rows and columns: {ctx.grid}")
    if ctx.segments_BT is not None:
        raise InputError(f"{method}: several documents in one row of the batch have no grid: one image per row")
    return ctx.grid[0], ctx.grid[1]


def seen_in_circle(ctx: Context, like_BHTK: Tensor, radius: int, rows: slice = slice(None)) -> Tensor:
    """Which keys the queries `rows` see in a circle of patches, bool [B, rows, T]: from the definition."""
    grid = patch_grid(ctx, "a circle")
    near_TT = circle(grid, radius, ctx.prefix, ctx.suffix, like_BHTK.device)
    return ctx.visible(like_BHTK, rows) & near_TT[rows]


def beside_grid(ctx: Context, like_BHTK: Tensor) -> Tensor:
    """Which tokens are no patches of the grid: bool [T]. Raises InputError where the grid is not known."""
    if ctx.grid is None:
        raise InputError("joint attention needs the grid of the image, which nobody handed over")
    T = like_BHTK.shape[2]
    column = torch.arange(T, device=like_BHTK.device)
    return (column < ctx.prefix) | (column >= T - ctx.suffix)


def text_softmax(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> WindowOutput:
    """The part of joint attention that stays softmax: what is beside the grid reads all tokens, the grid reads what is
    beside it. CLEAR (2412.16112) section 3.2; linear in the grid. Output, log-sum-exp and maximum (-inf: sees nothing).
    """
    dtype, group = compute_dtype(q_BHTK, k_BGTK, v_BGTV), q_BHTK.shape[1] // k_BGTK.shape[1]
    q, k, v = (x.to(dtype) for x in (q_BHTK, k_BGTK, v_BGTV))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    first, last = ctx.prefix, q.shape[2] - ctx.suffix

    def beside(x: Tensor) -> Tensor:
        return torch.cat([x[..., :first, :], x[..., last:, :]], -2)

    valid_BT = ctx.valid_BT
    valid_text = None if valid_BT is None else beside(valid_BT[..., None])[..., 0]
    image = attend(q[:, :, first:last], beside(k), beside(v), ctx.scale, valid_text)
    text = attend(beside(q), k, v, ctx.scale, valid_BT)
    return WindowOutput(*(torch.cat([t[:, :, :first], i, t[:, :, first:]], 2) for t, i in zip(text, image)))


class CircleBranch:
    """Softmax over the patches less than `radius` away and all tokens that are no patches: the local branch of images.
    Raises Unsupported for a layer of no image."""

    def __init__(self, radius: int, shape: SiteShape) -> None:
        self.radius = radius
        if not shape.image:
            raise Unsupported("radius counts patches of an image, and there are none here: set radius: 0")

    def circle(self, ctx: Context) -> Circle:
        return Circle(patch_grid(ctx, "radius"), self.radius, ctx.prefix, ctx.suffix)

    def two_sided(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, ctx: Context) -> WindowOutput:
        where = self.circle(ctx)._asdict()
        return WindowOutput(*local2d(q_BHTK, k_BGTK, v_BGTV, **where, scale=ctx.scale, valid_BT=ctx.valid_BT))
