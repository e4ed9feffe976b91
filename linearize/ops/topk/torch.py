"""Softmax over kept blocks of keys, one product for each pair of blocks: work in proportion to them, differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blocks_torch(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    kept_BHIJ: Tensor,
    block: int,
    scale: float,
    causal: bool,
    valid_BT: Tensor | None,
) -> Tensor:
    """Same as blocks_reference. The pairs are a list (row of the batch, head, block of queries, block of keys); heads
    may have as many as they like. Pairs of one block of queries meet in its log-sum-exp."""
    B, H, T, _ = q_BHTK.shape
    G, V, n = k_BGTK.shape[1], v_BGTV.shape[3], kept_BHIJ.shape[-1]
    row, head, i, j = kept_BHIJ.nonzero(as_tuple=True)

    def blocks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, n * block - T)) if n * block > T else x
        return x.unflatten(2, (n, block)).flatten(0, 2)

    queries = (row * H + head) * n + i  # which block of queries a pair belongs to
    keys = (row * G + head // (H // G)) * n + j
    scores = blocks(q_BHTK)[queries] @ blocks(k_BGTK)[keys].mT * scale
    place = torch.arange(block, device=scores.device)
    if n * block > T or valid_BT is not None:
        real_BT = torch.ones(B, T, device=scores.device, dtype=torch.bool) if valid_BT is None else valid_BT
        real = F.pad(real_BT, (0, n * block - T)).unflatten(1, (n, block))[row, j]
        scores = scores.masked_fill(~real[:, None], -torch.inf)
    if causal:
        hidden = (i == j)[:, None, None] & (place[:, None] < place)
        scores = scores.masked_fill(hidden, -torch.inf)
    group = queries[:, None].expand(-1, block)
    none = scores.new_full((B * H * n, block), -torch.inf)
    top = none.scatter_reduce(0, group, scores.detach().amax(-1), "amax", include_self=True)
    top = top.clamp(min=torch.finfo(scores.dtype).min)  # sees nothing: -inf - finite = -inf, exp = 0
    weights = (scores - top[queries][..., None]).exp()
    mass = scores.new_zeros(B * H * n, block).index_add(0, queries, weights.sum(-1))
    read = scores.new_zeros(B * H * n, block, V).index_add(0, queries, weights @ blocks(v_BGTV)[keys])
    out = read / mass.clamp(min=torch.finfo(scores.dtype).tiny)[..., None]
    return out.unflatten(0, (B, H, n)).flatten(2, 3)[:, :, :T]
