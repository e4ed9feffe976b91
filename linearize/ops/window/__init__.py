"""Softmax over a sliding window, with log-sum-exp and maximum so that others can be merged with it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from linearize.ops._dispatch import Implementation, choose, softmax_kernels_refuse, widened
from linearize.ops.window.reference import window_reference
from linearize.ops.window.torch import window_torch


class WindowOutput(NamedTuple):
    """output_BHTV (normalised), lse_BHT and max_BHT of the visible scores (-inf where nothing is visible)."""

    output: Tensor
    lse: Tensor
    max: Tensor


def _plain(run):
    """In the type of the computation, one key head for each query head."""
    return lambda q, k, v, *rest: run(*widened(q, k, v), *rest)


def _triton(*inputs):
    from linearize.ops.window.triton import window_triton

    return window_triton(*inputs)[:3]


IMPLEMENTATIONS = (
    Implementation("triton", _triton, softmax_kernels_refuse, device="cuda"),
    Implementation("torch", _plain(window_torch)),
    Implementation("reference", _plain(window_reference)),
)


def window(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    v_BGSV: Tensor,
    *,
    width: int,
    scale: float,
    codes_BT: Tensor,
    codes_BS: Tensor,
    ahead: int = 0,
    impl: str = "auto",
) -> WindowOutput:
    """Softmax of scale * q.k over the keys from `width` - 1 columns before the token to `ahead` after it.

    Causal windows have ahead 0, two-sided ones width - 1. Keys: S >= T columns, the last T of them the
    queries' own. codes: document number (from 1), 0 = invisible. A query sees keys of its own code.
    Computed in float32 or float64. Raises InputError for an unknown `impl`.
    """
    k, v = k_BGSK, v_BGSV
    spare = k.shape[2] - q_BHTK.shape[2] - (width - 1)
    if spare > 0:  # columns no query of this call can see
        k, v, codes_BS = k[:, :, spare:], v[:, :, spare:], codes_BS[:, spare:]
    inputs = (q_BHTK, k, v, width, ahead, scale, codes_BT, codes_BS)
    return WindowOutput(*choose("window", IMPLEMENTATIONS, impl, *inputs).run(*inputs))
