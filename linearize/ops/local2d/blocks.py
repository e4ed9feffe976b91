"""What a block-sparse kernel reads: blocks of 128 keys that a block of 128 queries touches, in the order of tokens."""

from __future__ import annotations

from typing import Literal

import torch


def key_blocks(
    grid: tuple[int, int],
    radius: int,
    order: Literal["tile", "row"] = "tile",
    tile: tuple[int, int] = (8, 16),
) -> float:
    """Mean number of key blocks with a key inside the circle of some query of a block, over all query blocks.

    "row": blocks are that many patches one after the other, row by row, so that their number grows with the width of
    the image. "tile": blocks are tiles of (rows, columns); it does not.
    """
    rows, columns = grid
    place = torch.arange(rows * columns)
    y, x = place // columns, place % columns
    across = -(-columns // tile[1])

    def block(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if order == "row":
            return (y * columns + x) // (tile[0] * tile[1])
        return (y // tile[0]) * across + x // tile[1]

    own = block(y, x)
    touched = torch.zeros(int(own.max()) + 1, int(own.max()) + 1, dtype=torch.bool)
    for dy in range(1 - radius, radius):
        for dx in range(1 - radius, radius):
            if dy * dy + dx * dx < radius * radius:
                inside = (y + dy >= 0) & (y + dy < rows) & (x + dx >= 0) & (x + dx < columns)
                touched[own[inside], block(y + dy, x + dx)[inside]] = True
    return float(touched.sum(1).float().mean())
