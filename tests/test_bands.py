"""One image over several processes equals one process; and what a block-sparse kernel reads of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from linearize.ops.local2d import local2d
from linearize.ops.local2d.bands import local2d_bands
from linearize.ops.local2d.blocks import key_blocks


@pytest.mark.parametrize("side, tile, row", [(64, 6.88, 8.38), (128, 7.91, 14.56), (256, 8.45, 29.56)])
def test_key_blocks_in_the_order_of_tiles(side, tile, row):
    """Blocks of 128, radius 8: constant in tiles, growing with the width row by row."""
    assert key_blocks((side, side), 8) == pytest.approx(tile, abs=0.0051)
    assert key_blocks((side, side), 8, "row") == pytest.approx(row, abs=0.0051)


def _process(rank, world, file, heights, radius, prefix, suffix):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        columns, rows = 7, sum(heights)
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(2, h, prefix + rows * columns + suffix, 8, generator=generator) for h in (4, 2, 2)]
        full = {"radius": radius, "scale": 8**-0.5, "prefix": prefix, "suffix": suffix}
        first = prefix + sum(heights[:rank]) * columns
        last = first + heights[rank] * columns

        def mine(x):
            return torch.cat([x[:, :, :prefix], x[:, :, first:last], x[:, :, x.shape[2] - suffix :]], 2)

        for dtype, apart in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            cast = [x.to(dtype) for x in whole]
            expected = mine(local2d(*cast, grid=(rows, columns), **full).output)
            found = local2d_bands(*map(mine, cast), grid=(heights[rank], columns), **full)
            assert (found - expected).abs().max() < apart, (rank, dtype)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "heights, radius, prefix, suffix",
    [
        ((5, 4), 3, 6, 0),
        ((5, 3, 1, 4), 4, 2, 3),  # a band lower than the halo: it reaches past its neighbours
        ((2, 2, 2, 2), 2, 0, 0),
    ],
)
def test_bands_equal_the_undivided_image(heights, radius, prefix, suffix, tmp_path):
    world = len(heights)
    more = (world, tmp_path / "rendezvous", heights, radius, prefix, suffix)
    multiprocessing.spawn(_process, more, nprocs=world)
