"""Softmax over a circle of patches, with log-sum-exp and maximum so that others can be merged with it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, compute_dtype
from linearize.ops.local2d.reference import local2d_reference
from linearize.ops.local2d.torch import fused, local2d_torch


class Local2dOutput(NamedTuple):
    """output_BHTV (normalised), lse_BHT and max_BHT of the visible scores (-inf where nothing is visible)."""

    output: Tensor
    lse: Tensor
    max: Tensor


IMPLEMENTATIONS = (Implementation("torch", local2d_torch), Implementation("reference", local2d_reference))


def local2d(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    *,
    grid: tuple[int, int],
    radius: int,
    scale: float,
    prefix: int = 0,
    suffix: int = 0,
    valid_BT: Tensor | None = None,
    impl: str = "auto",
) -> Local2dOutput:
    """Softmax of scale * q.k over the patches less than `radius` away: dy^2 + dx^2 < radius^2, strictly, clipped at the
    borders. CLEAR (2412.16112).

    T = prefix + rows * columns + suffix tokens, the patches row by row. The others (CLS, registers, text) see
    everybody and are seen by everybody. valid_BT: False at keys nobody sees (None: all are seen). Computed in float32
    or float64. Raises InputError for an unknown `impl`.
    """
    q, k, v, valid_BT = _plain(q_BHTK, k_BGTK, v_BGTV, valid_BT)
    run = choose("local2d", IMPLEMENTATIONS, impl, q, k, v).run
    return Local2dOutput(*run(q, k, v, grid, radius, scale, prefix, suffix, valid_BT))


def local2d_output(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    *,
    grid: tuple[int, int],
    radius: int,
    scale: float,
    prefix: int = 0,
    suffix: int = 0,
    valid_BT: Tensor | None = None,
) -> Tensor:
    """The output of `local2d` alone, by fused kernels, where nothing is merged with it. Tokens that see nothing get
    some finite number."""
    q, k, v, valid_BT = _plain(q_BHTK, k_BGTK, v_BGTV, valid_BT)
    return fused(q, k, v, grid, radius, scale, prefix, suffix, valid_BT)


def _plain(q: Tensor, k: Tensor, v: Tensor, valid_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the type of the computation, one key head for each query head, and which tokens are keys."""
    dtype = compute_dtype(q, k, v)
    group = q.shape[1] // k.shape[1]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return q, k, v, q.new_ones(q.shape[0], q.shape[2]).bool() if valid_BT is None else valid_BT


def pairs(grid: tuple[int, int], radius: int, others: int = 0) -> int:
    """How many (query, key) pairs are seen: what FLOPs are counted from. others: tokens beside the patches."""
    rows, columns = grid
    seen = 0
    for dy in range(min(radius, rows)):
        reach = min(math.isqrt(radius * radius - 1 - dy * dy), columns - 1)  # the largest dx inside the circle
        across = columns + 2 * sum(columns - dx for dx in range(1, reach + 1))
        seen += (1 if dy == 0 else 2) * (rows - dy) * across
    return seen + others * (2 * rows * columns + others)
