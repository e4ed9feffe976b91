"""One image over several processes, a band of rows each: exactly what one process computes.

Patches need the keys of `radius` - 1 rows above and below their band, and the text. Text needs everybody: each process
reads its own band, and the results are merged by log-sum-exp (CLEAR (2412.16112) averages them instead, which is an
approximation).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linearize.ops._dispatch import compute_dtype
from linearize.ops._softmax import attend, merge
from linearize.ops.local2d import local2d


@torch.no_grad()
def local2d_bands(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    *,
    grid: tuple[int, int],
    radius: int,
    scale: float,
    prefix: int = 0,
    suffix: int = 0,
    group: Any = None,
) -> Tensor:
    """o_BHTV of `local2d` over the whole image, for this process's tokens: prefix, its `grid` (rows, columns), suffix.

    Every process of `group` calls it, with bands in the order of ranks (of any height) and the same text. Sent: keys
    and values of radius - 1 rows to either side, and one output with its log-sum-exp per text token. No gradient.
    """
    dtype, heads = compute_dtype(q_BHTK, k_BGTK, v_BGTV), q_BHTK.shape[1] // k_BGTK.shape[1]
    q, k, v = q_BHTK.to(dtype), k_BGTK.to(dtype).repeat_interleave(heads, 1), v_BGTV.to(dtype)
    v = v.repeat_interleave(heads, 1)
    end = q.shape[2] - suffix

    def text(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, :prefix], x[:, :, end:]], 2)

    own_q, own_k, own_v = (x[:, :, prefix:end] for x in (q, k, v))
    above, keys, below = _with_halo(torch.cat([own_k, own_v], -1), grid, radius - 1, group)
    blank = own_q.new_zeros(*own_q.shape[:2], 1, own_q.shape[3])
    queries = torch.cat([blank.expand(-1, -1, above, -1), own_q, blank.expand(-1, -1, below, -1)], 2)
    rows = keys.shape[2] // grid[1]
    near = local2d(
        queries, keys[..., : k.shape[3]], keys[..., k.shape[3] :], grid=(rows, grid[1]), radius=radius, scale=scale
    )
    mine = slice(above, above + own_q.shape[2])
    patches = (near.output[:, :, mine], near.lse[:, :, mine])
    if not prefix and not suffix:
        return patches[0].to(q_BHTK.dtype)
    out, _ = merge(*patches, *attend(own_q, text(k), text(v), scale)[:2])
    read = _everywhere(*attend(text(q), own_k, own_v, scale)[:2], group)
    words, _ = merge(*read, *attend(text(q), text(k), text(v), scale)[:2])
    return torch.cat([words[:, :, :prefix], out, words[:, :, prefix:]], 2).to(q_BHTK.dtype)


def _everywhere(out: Tensor, lse: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of all processes, from each one's own."""
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    mass = (lse - top).exp()
    total = torch.cat([out * mass[..., None], mass[..., None]], -1)
    dist.all_reduce(total, dist.ReduceOp.SUM, group)
    return total[..., :-1] / total[..., -1:], top + total[..., -1].log()


def _with_halo(x_BHNK: Tensor, grid: tuple[int, int], reach: int, group: Any) -> tuple[int, Tensor, int]:
    """(tokens before, the band with the rows around it, tokens behind): up to `reach` rows from whoever has them."""
    rank, world, columns = dist.get_rank(group), dist.get_world_size(group), grid[1]
    heights = [torch.zeros(1, dtype=torch.long, device=x_BHNK.device) for _ in range(world)]
    dist.all_gather(heights, torch.full_like(heights[0], grid[0]), group)
    ends = torch.cat(heights).cumsum(0).tolist()
    starts = [0, *ends[:-1]]

    def needs(who: int, whose: int) -> tuple[int, int]:
        """The rows of `whose` band that `who` reads."""
        return max(starts[whose], starts[who] - reach), min(ends[whose], ends[who] + reach)

    received = {rank: x_BHNK}
    sends, receives = [], []
    for other in range(world):
        if other == rank:
            continue
        low, high = needs(other, rank)
        if low < high:
            piece = x_BHNK[:, :, (low - starts[rank]) * columns : (high - starts[rank]) * columns].contiguous()
            sends.append(dist.P2POp(dist.isend, piece, group=group, group_peer=other))
        low, high = needs(rank, other)
        if low < high:
            received[other] = x_BHNK.new_empty(*x_BHNK.shape[:2], (high - low) * columns, x_BHNK.shape[3])
            receives.append(dist.P2POp(dist.irecv, received[other], group=group, group_peer=other))
    if sends or receives:
        for work in dist.batch_isend_irecv([*sends, *receives]):
            work.wait()
    before = sum(received[i].shape[2] for i in range(rank) if i in received)
    behind = sum(received[i].shape[2] for i in range(rank + 1, world) if i in received)
    return before, torch.cat([received[i] for i in sorted(received)], 2), behind
