"""`local2d` on GPUs: launches of kernels.py, as operators of torch.library. Under TRITON_INTERPRET=1 also on CPU
tensors, for tests."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.ops._triton import TYPES, lowest, padded, precision, roomy, rows
from linearize.ops.local2d import kernels


class Tiles(NamedTuple):
    """Rows and columns of a program's own tile and of those that it reads, warps: so that no kernel spills registers
    (see benchmarks/aot.py)."""

    own: tuple[int, int]
    read: tuple[int, int]
    warps: int


def tiles(kernel: str, dtype: torch.dtype, roomy: bool, hip: bool) -> Tiles:
    """dtype: what products are as exact as. Of float32 operands a thread holds two parts."""
    if hip:
        return Tiles((4, 16), (2, 16), 4) if dtype == torch.bfloat16 else Tiles((2, 16), (2, 16), 4)
    if dtype == torch.bfloat16:
        large = roomy and kernel in ("forward", "back_q")
        return Tiles((8, 16), (4, 16), 8) if large else Tiles((4, 16), (2, 16), 8)
    if kernel == "forward":
        return Tiles((4 if roomy else 2, 16), (2, 16), 8)
    return Tiles((4, 16), (1, 16), 8) if roomy else Tiles((2, 16), (1, 16), 4)


INTERPRETED = Tiles((8, 16), (4, 16), 1)


def constants(dtype: torch.dtype, K: int, V: int, at: Tiles, hip: bool = False) -> dict[str, Any]:
    """Compile-time arguments of every kernel that depend on no mask."""
    (TY, TX), (UY, UX) = at.own, at.read
    return {
        "DT": TYPES[dtype],
        "PREC": precision(dtype, hip),
        "TY": TY,
        "TX": TX,
        "UY": UY,
        "UX": UX,
        "BK": padded(K),
        "BV": padded(V),
        "K": K,
        "V": V,
    }


class _Call:
    """Sizes, strides and constants of one call."""

    def __init__(self, q, k, v, valid, height, width, radius, scale, prefix, suffix, whole) -> None:
        self.inputs = [rows(x) for x in (q, k, v)]
        self.B, self.H, self.T, K = q.shape
        self.G, V = k.shape[1], v.shape[-1]
        self.valid = q if valid is None else valid.contiguous()  # where there is none, it is not read
        self.hip, self.dtype = torch.version.hip is not None, lowest(q.dtype, k.dtype, v.dtype)
        self.grid, self.others, self.sizes = (height, width), prefix + suffix, (K, V)
        self.strides = [n for x in self.inputs for n in x.stride()[:3]]
        self.numbers = [self.T, self.H, self.G, height, width, radius, prefix, self.others, scale]
        self.flags = {"VALID": valid is not None, "WHICH": whole}

    def launch(self, kernel: Any, heads: int, *args: Tensor) -> None:
        q = self.inputs[0]
        at = tiles(kernel.__name__, self.dtype, roomy(q.device), self.hip) if q.is_cuda else INTERPRETED
        own = at.own[0] * at.own[1]
        programs = math.prod(-(-n // side) for n, side in zip(self.grid, at.own, strict=True)) + -(-self.others // own)
        settings = {**constants(self.dtype, *self.sizes, at, self.hip), **self.flags}
        kernel[(programs, self.B * heads)](
            *self.inputs, self.valid, *args, *self.strides, *self.numbers, num_warps=at.warps, num_stages=1,
            **{name: value for name, value in settings.items() if name in kernel.arg_names},
        )  # fmt: skip


@torch.library.custom_op("linearize::local2d_triton", mutates_args=())
def local2d_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    radius: int,
    scale: float,
    prefix: int,
    suffix: int,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(output_BHTV, lse_BHT, max_BHT, the key that has the maximum [B, H, T]) of softmax over the circle.

    whole: output in float32, and gradients of all three; otherwise output in q's type, and of it alone.
    """
    call = _Call(q, k, v, valid, height, width, radius, scale, prefix, suffix, whole)
    B, H, T = q.shape[:3]
    out = q.new_empty(B, H, T, v.shape[-1], dtype=torch.float32 if whole else q.dtype)
    lse, top = (q.new_empty(B, H, T, dtype=torch.float32) for _ in range(2))
    which = q.new_empty((B, H, T) if whole else 0, dtype=torch.int32)
    call.launch(kernels.forward, H, out, lse, top, which)
    return out, lse, top, which


@local2d_triton.register_fake
def _(q, k, v, valid, height, width, radius, scale, prefix, suffix, whole):
    B, H, T = q.shape[:3]
    return (
        q.new_empty(B, H, T, v.shape[-1], dtype=torch.float32 if whole else q.dtype),
        *(q.new_empty(B, H, T, dtype=torch.float32) for _ in range(2)),
        q.new_empty((B, H, T) if whole else 0, dtype=torch.int32),
    )


@torch.library.custom_op("linearize::local2d_triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    which: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    d_top: Tensor,
    height: int,
    width: int,
    radius: int,
    scale: float,
    prefix: int,
    suffix: int,
    whole: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, valid, height, width, radius, scale, prefix, suffix, whole)
    d_out, d_top = d_out.contiguous(), d_top.contiguous()
    lost = ((d_out.float() * out.float()).sum(-1) - d_lse).contiguous()
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    call.launch(kernels.back_q, call.H, lse, which, d_out, lost, d_top, d_q)
    call.launch(kernels.back_k, call.G, lse, which, d_out, lost, d_top, d_k)
    call.launch(kernels.back_v, call.G, lse, d_out, d_v)
    return d_q, d_k, d_v


@_backward.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.numbers = *inputs[:4], inputs[4:]
    out, lse, _, which = output
    ctx.save_for_backward(*tensors, out, lse, which)
    ctx.set_materialize_grads(True)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor, d_top: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    d = _backward(*ctx.saved_tensors, d_out, d_lse, d_top, *ctx.numbers)
    return (*d, *[None] * (1 + len(ctx.numbers)))


local2d_triton.register_autograd(_gradients, setup_context=_setup)
