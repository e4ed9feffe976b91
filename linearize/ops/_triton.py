"""What all kernels share: tiles in and out, products, masks of documents; and how launches choose types and sizes."""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: bytes of shared memory of a block that the larger tiles need
ROOMY = 192 * 1024
#: operands of products: float16's range is too small for sums and gradients
TYPES = {torch.float32: tl.float32, torch.float16: tl.float32, torch.bfloat16: tl.bfloat16}


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def lowest(*dtypes: torch.dtype) -> torch.dtype:
    """What products are as exact as: bfloat16 where all are, float16 (of float32's range) where any has 16 bits."""
    if all(dtype == torch.bfloat16 for dtype in dtypes):
        return torch.bfloat16
    return torch.float16 if any(dtype.itemsize == 2 for dtype in dtypes) else torch.float32


def precision(dtype: torch.dtype, hip: bool) -> str:
    """Of products of float32 operands: on NVIDIA three tf32 ones together, which are as exact as float32 and keep the
    tensor cores; for float16 inputs a single one, which has their precision and float32's range."""
    if hip or dtype == torch.bfloat16:
        return "ieee"
    return "tf32" if dtype == torch.float16 else "tf32x3"


def roomy(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= ROOMY


def rows(x: Tensor) -> Tensor:
    """x with neighbouring columns side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def dot(a, b, DT: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(a.to(DT), b.to(DT), input_precision=PREC)


@triton.jit
def within(t, T, columns, size: tl.constexpr, B: tl.constexpr):
    mask = (t < T)[:, None]
    if size % B != 0:
        mask = mask & (columns < size)[None, :]
    return mask


@triton.jit
def load(x, t, T, first, size: tl.constexpr, B: tl.constexpr, stride):
    """Rows t, columns first .. first + B of x, 0 outside."""
    columns = first + tl.arange(0, B)
    place = x + t[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(place, mask=within(t, T, columns, size, B), other=0.0)


@triton.jit
def store(x, y, t, T, first, size: tl.constexpr, B: tl.constexpr):
    """To rows t of x [T, size]."""
    columns = first + tl.arange(0, B)
    place = x + t[:, None].to(tl.int64) * size + columns[None, :]
    tl.store(place, y.to(x.dtype.element_ty), mask=within(t, T, columns, size, B))


@triton.jit
def document(segments, b, t, T):
    return tl.load(segments + b * T + tl.minimum(tl.maximum(t, 0), T - 1))


@triton.jit
def masks(segments, b, c, t, T, DOCUMENTS: tl.constexpr, BT: tl.constexpr):
    """Of a chunk: which keys each query sees, which queries read the state, which keys go on into the next one."""
    real = t < T
    sees = (t[:, None] >= t[None, :]) & real[:, None] & real[None, :]
    reads, goes_on = real, real
    if DOCUMENTS:
        now = document(segments, b, t, T)
        sees = sees & (now[:, None] == now[None, :])
        reads = real & (now == document(segments, b, c * BT - 1, T))
        goes_on = real & (now == document(segments, b, c * BT + BT - 1, T))
    return sees, reads, goes_on


@triton.jit
def total_of(lse, t, real):
    """The log-sum-exp of queries, 0 where nothing is seen: there all scores are -inf."""
    total = tl.load(lse + t, mask=real, other=0.0)
    return tl.where(total == -float("inf"), 0.0, total)
