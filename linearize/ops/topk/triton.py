"""`topk` on GPUs: launches of kernels.py, as operators of torch.library. Under TRITON_INTERPRET=1 also on CPU tensors,
for tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.ops._triton import TYPES, lowest, padded, precision, rows
from linearize.ops.topk import kernels

#: blocks of a row of the mask that `lists` looks at together
LISTED = 512


class Tiles(NamedTuple):
    """Tokens of a program's own block at most and of those that it reads, warps: few enough to spill no registers."""

    own: int
    read: int
    warps: int


def tiles(kernel: str, dtype: torch.dtype, size: int, hip: bool) -> Tiles:
    """dtype: what products are as exact as. Of float32 operands a thread holds two parts. size: the larger head's."""
    wide, own = size > 128, 32 if kernel == "back_k" else 16
    if dtype != torch.bfloat16:
        return Tiles(16, 16, 4) if hip else Tiles(own, 16, 8)
    if hip or wide:
        return Tiles(32, 16 if wide else 32, 4 if hip else 8)
    return Tiles(32, 32, 8) if kernel == "back_k" else Tiles(64, 64, 8)


INTERPRETED = Tiles(32, 32, 1)


def constants(dtype: torch.dtype, K: int, V: int, block: int, at: Tiles, hip: bool = False) -> dict[str, Any]:
    """Compile-time arguments of every kernel that depend on no mask."""
    return {
        "DT": TYPES[dtype],
        "PREC": precision(dtype, hip),
        "OWN": min(at.own, padded(block)),
        "READ": at.read,
        "BK": padded(K),
        "BV": padded(V),
        "K": K,
        "V": V,
    }


class _Call:
    """Sizes, strides and constants of one call."""

    def __init__(self, q, k, v, kept, valid, block, scale, causal) -> None:
        self.inputs = [rows(x) for x in (q, k, v)]
        self.B, self.H, self.T, K = q.shape
        self.G, V, self.n = k.shape[1], v.shape[-1], kept.shape[-1]
        self.kept, self.block = kept.contiguous(), block
        self.valid = q if valid is None else valid.contiguous()  # where there is none, it is not read
        self.hip, self.dtype = torch.version.hip is not None, lowest(q.dtype, k.dtype, v.dtype)
        self.sizes = (K, V)
        self.strides = [n for x in self.inputs for n in x.stride()[:3]]
        self.numbers = [self.T, self.H, self.G, self.n, block, scale]
        self.flags = {"VALID": valid is not None, "CAUSAL": causal}

    def lists(self, columns: bool) -> tuple[Tensor, Tensor]:
        """(the blocks kept in each row or column of the mask, how many)."""
        index = self.kept.new_empty(self.kept.shape, dtype=torch.int32)
        counts = self.kept.new_empty(self.kept.shape[:3], dtype=torch.int32)
        at = min(LISTED, padded(self.n))
        kernels.lists[(self.n, self.B * self.H)](self.kept, index, counts, self.n, COLUMNS=columns, BLOCK=at)
        return index, counts

    def launch(self, kernel: Any, heads: int, *args: Tensor) -> None:
        q = self.inputs[0]
        at = INTERPRETED
        if q.is_cuda:
            at = tiles(kernel.__name__, self.dtype, max(map(padded, self.sizes)), self.hip)
        settings = constants(self.dtype, *self.sizes, self.block, at, self.hip)
        programs = self.n * -(-self.block // settings["OWN"])
        kernel[(programs, self.B * heads)](
            *self.inputs, self.valid, *args, *self.strides, *self.numbers, **settings, **self.flags,
            num_warps=at.warps, num_stages=1,
        )  # fmt: skip


@torch.library.custom_op("linearize::topk_triton", mutates_args=())
def topk_triton(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, valid: Tensor | None, block: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """(output_BHTV, lse_BHT) in float32 of softmax over the keys in kept blocks; 0 and -inf where nothing is seen. No
    gradient flows through the second."""
    call = _Call(q, k, v, kept, valid, block, scale, causal)
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    call.launch(kernels.forward, call.H, *call.lists(columns=False), out, lse)
    return out, lse


@topk_triton.register_fake
def _(q, k, v, kept, valid, block, scale, causal):
    return tuple(q.new_empty(*q.shape[:3], *more, dtype=torch.float32) for more in ((v.shape[-1],), ()))


@torch.library.custom_op("linearize::topk_triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    valid: Tensor | None,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    block: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, k, v, kept, valid, block, scale, causal)
    d_out = d_out.contiguous()
    given = (lse, d_out, (d_out * out).sum(-1))
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    call.launch(kernels.back_q, call.H, *call.lists(columns=False), *given, d_q)
    call.launch(kernels.back_k, call.G, *call.lists(columns=True), *given, d_k, d_v)
    return d_q, d_k, d_v


@_backward.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.numbers = *inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_backward(*ctx.saved_tensors, d_out, *ctx.numbers), *[None] * (2 + len(ctx.numbers)))


topk_triton.register_autograd(_gradients, setup_context=_setup)
