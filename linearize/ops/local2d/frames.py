"""The circle of patches in every frame of a video, or in those near by: local2d for each distance in time, merged."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops._softmax import merge
from linearize.ops.local2d import local2d


def frames(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    *,
    grid: tuple[int, int, int],
    radius: int,
    reach: int | None,
    scale: float,
    valid_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output_BHTV, lse_BHT) of softmax over the patches with dy^2 + dx^2 < radius^2 in frames at most `reach` away
    (None: all). T = frames * rows * columns, frame by frame."""
    count = grid[0]
    span = count - 1 if reach is None else min(reach, count - 1)
    q, k, v = (x.unflatten(2, (count, -1)) for x in (q_BHTK, k_BHTK, v_BHTV))
    valid = None if valid_BT is None else valid_BT.unflatten(1, (count, -1))
    out, lse = None, None
    for apart in sorted(range(-span, span + 1), key=abs):  # the frame itself first: it always sees something
        low, high = max(0, -apart), count - max(0, apart)

        def part(x: Tensor, shift: int, low: int = low, high: int = high) -> Tensor:
            return x[:, :, low + shift : high + shift].transpose(1, 2).flatten(0, 1)

        seen = None if valid is None else valid[:, low + apart : high + apart].flatten(0, 1)
        near = local2d(
            part(q, 0), part(k, apart), part(v, apart), grid=grid[1:], radius=radius, scale=scale, valid_BT=seen
        )

        def placed(x: Tensor, fill: float, low: int = low, high: int = high) -> Tensor:
            x = x.unflatten(0, (-1, high - low)).transpose(1, 2)
            return F.pad(x, (0, 0) * (x.ndim - 3) + (low, count - high), value=fill)

        here, mass = placed(near.output, 0.0), placed(near.lse, -torch.inf)
        out, lse = (here, mass) if out is None or lse is None else merge(out, lse, here, mass)
    assert out is not None and lse is not None
    return out.flatten(2, 3), lse.flatten(2, 3)
