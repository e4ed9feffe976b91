"""Softmax over a circle of patches, by tiles of queries: O(T x radius^2), plain torch, differentiable."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.ops._softmax import weigh

TILE = 16


def local2d_torch(
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
    """Same as local2d_reference. A tile of 16 x 16 queries reads the (16 + 2 (radius - 1))^2 keys around it, and the
    tokens that are no patches; those read everything."""
    tiles = Tiles(grid, radius - 1, q_BHTK.device)
    outs = []
    for q, k, v, seen in _blocks(tiles, q_BHTK, k_BHTK, v_BHTV, radius, prefix, suffix, valid_BT):
        outs.append(_softmax(q, k, v, scale, seen[:, None]))
    out, lse, top = (tiles.together(list(x)) for x in zip(*outs, strict=True))
    if prefix or suffix:
        q = _beside(q_BHTK, prefix, suffix)
        others = _softmax(q, k_BHTK, v_BHTV, scale, valid_BT[:, None, None])
        out, lse, top = (_between(x, y, prefix) for x, y in zip(others, (out, lse, top), strict=True))
    return out, lse[..., 0], top[..., 0]


def fused(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    grid: tuple[int, int],
    radius: int,
    scale: float,
    prefix: int,
    suffix: int,
    valid_BT: Tensor,
) -> Tensor:
    """The output alone, by torch's own fused attention over the same tiles."""
    tiles = Tiles(grid, radius - 1, q_BHTK.device)
    hidden = torch.finfo(q_BHTK.dtype).min / 2  # not -inf: a row that sees nothing must stay a number

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, hidden)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    outs = []
    for parts in _blocks(tiles, q_BHTK, k_BHTK, v_BHTV, radius, prefix, suffix, valid_BT):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in parts[:3])
        out = attend(q, k, v, parts[3][:, :, None].flatten(0, 1))
        outs.append(out.unflatten(0, (-1, tiles.across)).transpose(1, 2))
    out = tiles.together(outs)
    if not prefix and not suffix:
        return out
    others = attend(_beside(q_BHTK, prefix, suffix), k_BHTK, v_BHTV, valid_BT[:, None, None])
    return _between(others, out, prefix)


def _softmax(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights, filled, lse, top = weigh((q @ k.mT * scale).masked_fill(~seen, -torch.inf))
    return (weights @ v) / filled[..., None], lse[..., None], top[..., None]


def _blocks(
    tiles: Tiles,
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    radius: int,
    prefix: int,
    suffix: int,
    valid_BT: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each row of tiles: queries [B, H, tiles, Q, K], their keys and values [B, H, tiles, S, .], and which are seen
    [B, tiles, Q, S]; the keys of tokens that are no patches come last."""
    patches = slice(prefix, q_BHTK.shape[2] - suffix)
    k_P, v_P = (_beside(x, prefix, suffix)[:, :, None] for x in (k_BHTK, v_BHTV))
    valid_BP = _beside(valid_BT[:, None, :, None], prefix, suffix)[:, 0, :, 0]
    keys, values = (tiles.keys(x[:, :, patches]) for x in (k_BHTK, v_BHTV))
    seen = tiles.seen(valid_BT[:, patches], radius)
    for q, k, v, seen_BnQS in zip(tiles.queries(q_BHTK[:, :, patches]), keys, values, seen, strict=True):
        if prefix or suffix:
            n = tiles.across
            k = torch.cat([k, k_P.expand(-1, -1, n, -1, -1)], 3)
            v = torch.cat([v, v_P.expand(-1, -1, n, -1, -1)], 3)
            more = valid_BP[:, None, None].expand(-1, n, seen_BnQS.shape[2], -1)
            seen_BnQS = torch.cat([seen_BnQS.expand(more.shape[0], -1, -1, -1), more], 3)
        yield q, k, v, seen_BnQS


class Tiles:
    """A grid cut into tiles of queries, each with the keys around it: at most `reach` rows or columns away. Where that
    is no less than the whole grid, the grid is one tile and reach is 0."""

    def __init__(self, grid: tuple[int, int], reach: int, device: torch.device, side: int = TILE) -> None:
        self.rows, self.columns = grid
        reach = min(reach, max(grid) - 1)
        self.height, self.width, self.reach, self.device = min(side, grid[0]), min(side, grid[1]), reach, device
        if (self.height + 2 * reach) * (self.width + 2 * reach) >= self.rows * self.columns:
            self.height, self.width, self.reach = self.rows, self.columns, 0
        self.down, self.across = -(-self.rows // self.height), -(-self.columns // self.width)
        self.below = self.down * self.height - self.rows
        self.right = self.across * self.width - self.columns

    def queries(self, x_BHTK: Tensor) -> list[Tensor]:
        """For each row of tiles, its queries [B, H, tiles, Q, K]; beyond the borders zeros."""
        x = x_BHTK.unflatten(2, (self.rows, self.columns))
        x = F.pad(x, (0, 0, 0, self.right, 0, self.below)) if self.right or self.below else x
        tiles = x.unflatten(3, (self.across, self.width)).unflatten(2, (self.down, self.height))
        return list(tiles.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).unbind(2))

    def keys(self, x_BHTK: Tensor) -> Iterator[Tensor]:
        """For each row of tiles, the keys around each tile [B, H, tiles, S, K]; beyond the borders zeros."""
        x = x_BHTK.unflatten(2, (self.rows, self.columns))
        n = self.reach
        x = F.pad(x, (0, 0, n, n + self.right, n, n + self.below)) if n or self.right or self.below else x
        high, wide = self.height + 2 * n, self.width + 2 * n
        for top in range(0, self.down * self.height, self.height):  # one at a time: the keys are gathered many times
            yield x[:, :, top : top + high].unfold(3, wide, self.width).permute(0, 1, 3, 2, 5, 4).flatten(3, 4)

    def seen(self, valid_BT: Tensor, radius: int) -> Iterator[Tensor]:
        """For each row of tiles, which of its keys are real and in the circle: bool [B, tiles, Q, S]."""
        near_QS = self.near(radius)
        for real in self.keys(valid_BT[:, None, :, None]):
            yield real[:, 0, :, :, 0][:, :, None] & near_QS

    def near(self, radius: int) -> Tensor:
        """Which places around a tile are in each query's circle, wherever the tile is: bool [Q, S]."""
        n = self.reach

        def places(high: int, wide: int, off: int) -> tuple[Tensor, Tensor]:
            place = torch.arange(high * wide, device=self.device)
            return place // wide - off, place % wide - off

        (y, x), (v, u) = places(self.height, self.width, 0), places(self.height + 2 * n, self.width + 2 * n, n)
        return (y[:, None] - v) ** 2 + (x[:, None] - u) ** 2 < radius**2

    def together(self, rows: list[Tensor]) -> Tensor:
        """What `queries` made, as it was: [B, H, T, V]."""
        x = torch.stack(rows, 2).unflatten(4, (self.height, self.width)).transpose(3, 4)
        x = x.flatten(4, 5).flatten(2, 3)[:, :, : self.rows, : self.columns]
        return x.flatten(2, 3)


def _between(others_BHPV: Tensor, patches_BHTV: Tensor, prefix: int) -> Tensor:
    """Patches back between the tokens before and behind them."""
    return torch.cat([others_BHPV[:, :, :prefix], patches_BHTV, others_BHPV[:, :, prefix:]], 2)


def _beside(x_BHTK: Tensor, prefix: int, suffix: int) -> Tensor:
    """The tokens that are no patches."""
    return torch.cat([x_BHTK[:, :, :prefix], x_BHTK[:, :, x_BHTK.shape[2] - suffix :]], 2)
