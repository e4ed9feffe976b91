"""`mapped_linear` on GPUs: launches of kernels.py. Under TRITON_INTERPRET=1 also on CPU tensors, for tests."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.ops._maps import MAPS
from linearize.ops._triton import TYPES, padded, precision, roomy, rows
from linearize.ops.mapped_linear import kernels
from linearize.ops.mapped_linear.operator import Passes, build

#: elements of a state that one program of `scan` carries
SCANNED = 512
#: the map's number in the kernels
_NUMBERS = {"split_softmax": 0, "exp": 1, "joint_softmax": 2, "t2r": 3, "relu": 3, "elu": 4}


class Tiles(NamedTuple):
    """Tokens of a chunk, columns of v at a time, warps: so that no kernel spills registers (see benchmarks/aot.py)."""

    tokens: int
    columns: int
    warps: int


def tiles(largest: int, roomy: bool, hip: bool) -> Tiles:
    """largest: of the head sizes. A tile's registers are shared by warps of 32 threads, or of 64 on AMD."""
    if hip:
        return Tiles(64, 64, 4)
    return Tiles(64, 64, 4 if padded(largest) <= 64 else 8) if roomy else Tiles(32, 32, 4)


def _here(q: Tensor, largest: int) -> Tiles:
    if not q.is_cuda:  # the interpreter
        return INTERPRETED
    hip = torch.version.hip is not None
    return tiles(largest, hip or roomy(q.device), hip)


INTERPRETED = Tiles(32, 16, 1)


def constants(name: str, dtype: torch.dtype, K: int, C: int, V: int, at: Tiles, hip: bool = False) -> dict[str, Any]:
    """Compile-time arguments of every kernel that depend on no mask."""
    return {
        "MAP": _NUMBERS[name],
        "HALVES": MAPS[name].factor,
        "SPLIT": dtype in (torch.bfloat16, torch.float16),
        "DT": TYPES[dtype],
        "PREC": precision(dtype, hip),
        "BT": at.tokens,
        "BV": min(at.columns, padded(V)),
        "BK": padded(K),
        "BC": padded(C),
        "K": K,
        "C": C,
        "V": V,
    }


class _Call:
    """Sizes, strides and constants of one call."""

    def __init__(self, q, k, v, w_q, w_k, b_q, b_k, valid, segments, name: str, key_heads: int) -> None:
        self.q, self.k, self.v = rows(q), rows(k), rows(v)
        self.like, self.name = q, name
        B, self.H, self.T, self.K = q.shape
        self.B, self.J, self.V = B, key_heads, v.shape[-1]
        self.R, self.E = self.H // self.J, self.J // k.shape[1]
        self.C = self.K if w_q is None else w_q.shape[-1]
        self.F = self.C * MAPS[name].factor
        self.maps = [None if w is None else w.contiguous() for w in (w_q, w_k, b_q, b_k)]
        self.split = [None if w is None else self._split(w) for w in self.maps[:2]]
        self.masks = [None if m is None else m.contiguous() for m in (valid, segments)]
        self.tiles = _here(q, max(self.K, self.C, self.V))
        self.chunks = -(-self.T // self.tiles.tokens)
        self.strides = [n for x in (self.q, self.k, self.v) for n in x.stride()[:3]]
        self.flags = {
            "MAPPED": w_q is not None,
            "BIASED": b_q is not None,
            "VALID": valid is not None,
            "DOCUMENTS": segments is not None,
        }
        sizes = (self.K, self.C, self.V)
        self.constants = {**constants(name, q.dtype, *sizes, self.tiles, torch.version.hip is not None), **self.flags}
        self.blocks = -(-self.V // self.constants["BV"])

    def _split(self, w: Tensor) -> Tensor:
        """The parts of q's type whose sum W is, [1 or 2, heads, K, C]."""
        high = w.to(self.like.dtype)
        rest = (w.float() - high.float()).to(high.dtype)
        return torch.stack([high, rest]) if high.dtype.itemsize < 4 else high[None]

    @property
    def sizes(self) -> list[int]:
        return [self.T, self.H, self.J, self.R, self.E, self.chunks]

    def given(self, *tensors: Tensor | None) -> list[Tensor]:
        """Tensors that kernels take; something else where there is none, which is not read."""
        return [self.q if t is None else t for t in tensors]

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.constants, "num_warps": self.tiles.warps, "num_stages": 1}

    def sums(self, back: bool, y: Tensor, mass: Tensor | None) -> Tensor:
        """What each chunk adds, [B, J, chunks, F, V + 1]."""
        out = self.like.new_empty(self.B, self.J, self.chunks, self.F, self.V + 1, dtype=torch.float32)
        x, which = (self.q, 0) if back else (self.k, 1)
        inputs = self.given(mass, *self.masks, self.split[which], self.maps[2 + which])
        kernels.sums[(self.chunks, self.blocks * self.constants["HALVES"], self.B * self.J)](
            x, y, *inputs, out, *x.stride()[:3], *y.stride()[:3], *self.sizes, 0.0, BACK=back, **self.settings
        )
        return out

    def scan(self, added: Tensor, first: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
        """(the state before each chunk, or its gradient behind it; the one at the other end)."""
        before, last, size = torch.empty_like(added), torch.empty_like(added[:, :, 0]), self.F * (self.V + 1)
        kernels.scan[(-(-size // SCANNED), self.B * self.J)](
            added, *self.given(first, self.masks[1]), before, last, self.T, self.J, size, self.chunks,
            DOCUMENTS=self.flags["DOCUMENTS"], GIVEN=first is not None, BACK=back, BT=self.tiles.tokens, BLOCK=SCANNED,
        )  # fmt: skip
        return before, last

    @property
    def inputs(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.given(*self.split, *self.maps[2:], *self.masks)]


def _forward(q, k, v, w_q, w_k, b_q, b_k, valid, segments, state, name, key_heads, eps, keep):
    call = _Call(q, k, v, w_q, w_k, b_q, b_k, valid, segments, name, key_heads)
    first = None if state is None else state.to(torch.float32).contiguous()
    before, last = call.scan(call.sums(False, call.v, None), first, False)
    out = q.new_empty(call.B, call.H, call.T, call.V)
    mass = q.new_empty(call.B, call.H, call.T, dtype=torch.float32)
    kernels.forward[(call.chunks, call.blocks, call.B * call.H)](
        *call.inputs, before, out, mass, *call.strides, *call.sizes, eps, **call.settings
    )
    kept = last.new_empty(call.B, call.J, int(keep), call.F, call.V + 1)
    if keep:
        kept[:, :, 0] = 0 if first is None else first
    return out, mass, last, kept


def _backward(
    q, k, v, w_q, w_k, b_q, b_k, valid, segments, output, mass, kept, d_output, d_mass, d_state, name, key_heads, eps
):
    call = _Call(q, k, v, w_q, w_k, b_q, b_k, valid, segments, name, key_heads)
    B, H, J, T, C, V = call.B, call.H, call.J, call.T, call.C, call.V
    exact = d_output.float() / (mass + eps)[..., None]
    d_num = exact.to(q.dtype).contiguous()
    d_mass = (d_mass - (exact * output.float()).sum(-1)).contiguous()
    # Adding chunks up once more costs less than keeping a state for each of them.
    before, _ = call.scan(call.sums(False, call.v, None), kept[:, :, 0].contiguous(), False)
    behind, d_first = call.scan(call.sums(True, d_num, d_mass), d_state.contiguous(), True)
    parts = torch.float32 if call.blocks > 1 else q.dtype
    d_uq, d_uk = (q.new_empty(call.blocks, B, heads, T, C, dtype=parts) for heads in (H, J))
    d_v = q.new_empty(B, J, T, V)
    kernels.back_q[(call.chunks, call.blocks, B * H)](
        *call.inputs, before, d_num, d_mass, d_uq, *call.strides, *call.sizes, eps, **call.settings
    )
    kernels.back_k[(call.chunks, call.blocks, B * J)](
        *call.inputs, behind, d_num, d_mass, d_uk, *call.strides, *call.sizes, eps, **call.settings
    )
    q_and_k = [x for i, x in enumerate(call.inputs) if i != 2]
    kernels.back_v[(call.chunks, call.blocks, B * J)](
        *q_and_k, behind, d_num, d_v, *call.strides[:6], *call.sizes, **call.settings
    )
    d_uq, d_uk = (d[0] if call.blocks == 1 else d.sum(0) for d in (d_uq, d_uk))
    d_q, d_wq = _through_map(call.q, d_uq, w_q)
    d_k, d_wk = _through_map(call.k if call.E == 1 else call.k.repeat_interleave(call.E, 1), d_uk, w_k)
    d_bq, d_bk = (q.new_empty(0) if w is None else d.float().sum((0, 2)) for d, w in ((d_uq, b_q), (d_uk, b_k)))
    if call.E > 1:
        d_k, d_v = (x.unflatten(1, (-1, call.E)).sum(2) for x in (d_k, d_v))
    return (d_q, d_k, d_v, d_wq, d_wk, d_bq.float(), d_bk.float(), d_first)


def _through_map(x_BHTK: Tensor, d_u_BHTC: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """(d x, d W) of u = x W + b: two plain products."""
    dtype = x_BHTK.dtype
    d_u = d_u_BHTC.to(dtype)
    if w is None:
        return d_u, x_BHTK.new_empty(0, dtype=torch.float32)
    x_HTK, d_HTC = (t.transpose(0, 1).flatten(1, 2) for t in (x_BHTK, d_u))
    d_x = d_u @ w.to(dtype).mT
    if dtype.itemsize < 4 and d_u.is_cuda:
        return d_x, torch.bmm(x_HTK.mT, d_HTC, out_dtype=torch.float32)
    return d_x, x_HTK.float().mT @ d_HTC.float()


mapped_linear_triton = build("triton", Passes(_forward, _backward, lambda T: 1))


def step_triton(q, k, v, weights, biases, valid, state, name, key_heads, eps) -> tuple[Tensor, Tensor, Tensor]:
    """One token, without gradients: (output, mass, new state)."""
    call = _Call(q, k, v, *weights, *biases, valid, None, name, key_heads)
    out, mass = q.new_empty(call.B, call.H, 1, call.V), q.new_empty(call.B, call.H, 1, dtype=torch.float32)
    new = q.new_empty(call.B, call.J, call.F, call.V + 1, dtype=torch.float32)
    first = None if state is None else state.to(torch.float32).contiguous()
    block = 16  # few columns each: one sequence alone must fill the device
    s = call.strides
    c = {
        name: call.constants[name] for name in ("MAP", "HALVES", "MAPPED", "BIASED", "VALID", "BK", "BC", "K", "C", "V")
    }
    kernels.step[(math.ceil(call.V / block), call.B * call.J)](
        call.q, call.k, call.v, *call.given(*call.maps, valid, first), new, out, mass, s[0], s[1], s[3], s[4], s[6],
        s[7], call.H, call.J, call.R, call.E, eps=eps, GIVEN=first is not None, BV=block, **c,
    )  # fmt: skip
    return out, mass, new
