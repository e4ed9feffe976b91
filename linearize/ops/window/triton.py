"""`window` on GPUs: launches of kernels.py, as operators of torch.library. Under TRITON_INTERPRET=1 also on CPU
tensors, for tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.ops._triton import TYPES, lowest, padded, precision, roomy, rows
from linearize.ops.window import kernels


class Tiles(NamedTuple):
    """Tokens of a program's own block and of the blocks that it reads, warps: so that no kernel spills registers (see
    benchmarks/aot.py)."""

    own: int
    read: int
    warps: int


def tiles(kernel: str, dtype: torch.dtype, roomy: bool, hip: bool) -> Tiles:
    """dtype: what products are as exact as. Of float32 operands a thread holds two parts."""
    if hip:
        return Tiles(64, 32, 4) if dtype == torch.bfloat16 else Tiles(32, 32, 4)
    if dtype == torch.bfloat16:
        if kernel in ("forward", "back_q"):
            return Tiles(128, 64, 8) if roomy else Tiles(64, 32, 8)
        return Tiles(64 if roomy else 32, 32, 8)
    if kernel == "forward":
        return Tiles(64 if roomy else 32, 32, 8)
    return Tiles(64, 16, 8) if roomy else Tiles(32, 16, 4)


INTERPRETED = Tiles(32, 16, 1)


def constants(dtype: torch.dtype, K: int, V: int, at: Tiles, hip: bool = False) -> dict[str, Any]:
    """Compile-time arguments of every kernel."""
    return {
        "DT": TYPES[dtype],
        "PREC": precision(dtype, hip),
        "BT": at.own,
        "BS": at.read,
        "BK": padded(K),
        "BV": padded(V),
        "K": K,
        "V": V,
    }


class _Call:
    """Sizes, strides and constants of one call."""

    def __init__(self, q, k, v, codes_T, codes_S, width, ahead, scale) -> None:
        self.inputs = [*(rows(x) for x in (q, k, v)), codes_T.contiguous(), codes_S.contiguous()]
        self.B, self.H, self.T, K = q.shape
        self.G, self.S, V = k.shape[1], k.shape[2], v.shape[-1]
        self.hip, self.dtype, self.sizes = torch.version.hip is not None, lowest(q.dtype, k.dtype, v.dtype), (K, V)
        self.strides = [n for x in self.inputs[:3] for n in x.stride()[:3]]
        self.numbers = [self.T, self.S, self.H, self.G, width, ahead, scale]

    def launch(self, kernel: Any, tokens: int, heads: int, *args: Tensor) -> None:
        q = self.inputs[0]
        at = tiles(kernel.__name__, self.dtype, roomy(q.device), self.hip) if q.is_cuda else INTERPRETED
        kernel[(-(-tokens // at.own), self.B * heads)](
            *self.inputs, *args, *self.strides, *self.numbers, num_warps=at.warps, num_stages=1,
            **constants(self.dtype, *self.sizes, at, self.hip),
        )  # fmt: skip


@torch.library.custom_op("linearize::window_triton", mutates_args=())
def window_triton(
    q: Tensor, k: Tensor, v: Tensor, width: int, ahead: int, scale: float, codes_BT: Tensor, codes_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output_BHTV, lse_BHT, max_BHT, the column of the key that has the maximum [B, H, T]), all but that float32."""
    call = _Call(q, k, v, codes_BT, codes_BS, width, ahead, scale)
    made = _outputs(q, k, v)
    call.launch(kernels.forward, call.T, call.H, *made)
    return made


@window_triton.register_fake
def _outputs(q, k, v, *rest):
    B, H, T = q.shape[:3]
    floats = (q.new_empty(*size, dtype=torch.float32) for size in ((B, H, T, v.shape[-1]), (B, H, T), (B, H, T)))
    return (*floats, q.new_empty(B, H, T, dtype=torch.int32))


@torch.library.custom_op("linearize::window_triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes_BT: Tensor,
    codes_BS: Tensor,
    out: Tensor,
    lse: Tensor,
    which: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    d_top: Tensor,
    width: int,
    ahead: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, codes_BT, codes_BS, width, ahead, scale)
    d_out, d_top = d_out.contiguous(), d_top.contiguous()
    lost = ((d_out * out).sum(-1) - d_lse).contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    call.launch(kernels.back_q, call.T, call.H, lse, which, d_out, lost, d_top, d_q)
    call.launch(kernels.back_k, call.S, call.G, lse, which, d_out, lost, d_top, d_k)
    call.launch(kernels.back_v, call.S, call.G, lse, d_out, d_v)
    return d_q, d_k, d_v


@_backward.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.numbers, codes_BT, codes_BS = inputs
    out, lse, _, which = output
    ctx.save_for_backward(q, k, v, codes_BT, codes_BS, out, lse, which)
    ctx.set_materialize_grads(True)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor, d_top: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, d_out, d_lse, d_top, *ctx.numbers), *[None] * 5)


window_triton.register_autograd(_gradients, setup_context=_setup)
