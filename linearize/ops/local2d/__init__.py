"""Softmax over a circle of patches, with log-sum-exp and maximum so that others can be merged with it."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, softmax_kernels_refuse, widened
from linearize.ops.local2d.reference import local2d_reference
from linearize.ops.local2d.torch import fused, local2d_torch


class Local2dOutput(NamedTuple):
    """output_BHTV (normalised), lse_BHT and max_BHT of the visible scores (-inf where nothing is visible)."""

    output: Tensor
    lse: Tensor
    max: Tensor


def _plain(run):
    """In the type of the computation, one key head for each query head, and which tokens are keys."""

    def plain(q, k, v, grid, radius, scale, prefix, suffix, valid_BT):
        q, k, v = widened(q, k, v)
        valid_BT = q.new_ones(q.shape[0], q.shape[2]).bool() if valid_BT is None else valid_BT
        return run(q, k, v, grid, radius, scale, prefix, suffix, valid_BT)

    return plain


def _triton(q, k, v, grid, radius, scale, prefix, suffix, valid_BT, whole=True):
    from linearize.ops.local2d.triton import local2d_triton

    # beyond the diagonal of the grid a radius changes nothing, and its square must stay a small number
    return local2d_triton(q, k, v, valid_BT, *grid, min(radius, sum(grid)), scale, prefix, suffix, whole)[:3]


def _triton_output(*args):
    return _triton(*args, whole=False)[0]


IMPLEMENTATIONS = (
    Implementation("triton", _triton, softmax_kernels_refuse, device="cuda"),
    Implementation("torch", _plain(local2d_torch)),
    Implementation("reference", _plain(local2d_reference)),
)
#: of the output alone
FUSED = (
    Implementation("triton", _triton_output, softmax_kernels_refuse, device="cuda"),
    Implementation("torch", _plain(fused)),
)


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
    or float64. Raises InputError for an unknown or refusing `impl`.
    """
    run = choose("local2d", IMPLEMENTATIONS, impl, q_BHTK, k_BGTK, v_BGTV).run
    return Local2dOutput(*run(q_BHTK, k_BGTK, v_BGTV, grid, radius, scale, prefix, suffix, valid_BT))


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
    impl: str = "auto",
) -> Tensor:
    """The output of `local2d` alone, by fused kernels (Triton's: in q's type), where nothing is merged with it. Tokens
    that see nothing get some finite number. Raises InputError for an unknown or refusing `impl`."""
    run = choose("local2d", FUSED, impl, q_BHTK, k_BGTK, v_BGTV).run
    return run(q_BHTK, k_BGTK, v_BGTV, grid, radius, scale, prefix, suffix, valid_BT)


def pairs(grid: tuple[int, int], radius: int, others: int = 0) -> int:
    """How many (query, key) pairs are seen: what FLOPs are counted from. others: tokens beside the patches."""
    rows, columns = grid
    seen = 0
    for dy in range(min(radius, rows)):
        reach = min(math.isqrt(radius * radius - 1 - dy * dy), columns - 1)  # the largest dx inside the circle
        across = columns + 2 * sum(columns - dx for dx in range(1, reach + 1))
        seen += (1 if dy == 0 else 2) * (rows - dy) * across
    return seen + others * (2 * rows * columns + others)
