"""Softmax over a circle of patches, from its definition, quadratic."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.window.reference import softmax_over


def circle(
    grid: tuple[int, int], radius: int, prefix: int = 0, suffix: int = 0, device: torch.device | None = None
) -> Tensor:
    """Which keys each token sees, bool [T, T]: a patch those with dy^2 + dx^2 < radius^2 and all that are no patches,
    which see everybody."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=device)
    y, x = place // columns, place % columns
    near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    return torch.nn.functional.pad(near, (prefix, suffix, prefix, suffix), value=True)


def local2d_reference(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    grid: tuple[int, int],
    radius: int,
    scale: float,
    prefix: int,
    suffix: int,
    valid_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(output_BHTV, lse_BHT, max_BHT) of softmax over the circle. Where nothing is visible: 0, -inf, -inf."""
    seen_BTT = circle(grid, radius, prefix, suffix, q_BHTK.device) & valid_BT[:, None]
    return softmax_over(q_BHTK, k_BHTK, v_BHTV, scale, seen_BTT)
