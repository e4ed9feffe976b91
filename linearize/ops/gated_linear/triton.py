"""`gated_linear` on GPUs: launches of kernels.py, as operators of torch.library. Under TRITON_INTERPRET=1 also on CPU
tensors, for tests."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.ops._triton import TYPES, lowest, padded, precision, roomy, rows
from linearize.ops.gated_linear import kernels

#: elements of a state that one program of `scan` carries
SCANNED = 512
#: columns of a state that one program of `step` carries: few, so that one sequence alone fills the device
STEPPED = 16


class Tiles(NamedTuple):
    """Tokens of a chunk, features and columns of v at a time, warps: so that no kernel spills registers (see
    benchmarks/aot.py)."""

    tokens: int
    features: int
    columns: int
    warps: int


def tiles(dtype: torch.dtype, roomy: bool) -> Tiles:
    """dtype: what products are as exact as. Of float32 operands a thread holds two parts."""
    if dtype == torch.bfloat16:
        return Tiles(64, 64, 64, 8) if roomy else Tiles(32, 32, 32, 4)
    return Tiles(64, 32, 32, 8) if roomy else Tiles(32, 16, 32, 4)


INTERPRETED = Tiles(32, 32, 32, 1)


def constants(dtype: torch.dtype, F: int, V: int, narrow: bool, at: Tiles, hip: bool = False) -> dict[str, Any]:
    """Compile-time arguments of every kernel that depend on no mask."""
    return {
        "NARROW": narrow,
        "ROUNDS": at.tokens.bit_length() - 1,
        "DT": TYPES[dtype],
        "PREC": precision(dtype, hip),
        "BT": at.tokens,
        "BF": min(at.features, padded(F)),
        "BV": min(at.columns, padded(V)),
        "F": F,
        "V": V,
    }


class _Call:
    """Sizes, strides and constants of one call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, segments: Tensor | None) -> None:
        self.q, self.k, self.v, self.g = (rows(x) for x in (q, k, v, log_gate))
        self.segments = q if segments is None else segments.contiguous()  # where there is none, it is not read
        self.B, self.H, self.T, self.F = q.shape
        self.J, self.V = k.shape[1], v.shape[-1]
        self.R, self.E = self.H // self.J, self.J // v.shape[1]
        self.gates = log_gate.shape[-1]
        hip = torch.version.hip is not None
        dtype = lowest(q.dtype, k.dtype, v.dtype)
        self.tiles = at = tiles(dtype, hip or roomy(q.device)) if q.is_cuda else INTERPRETED
        self.constants = constants(dtype, self.F, self.V, self.gates < self.F, at, hip)
        self.settings = {**self.constants, "DOCUMENTS": segments is not None}
        self.chunks = -(-self.T // at.tokens)
        self.blocks_f, self.blocks_v = -(-self.F // self.constants["BF"]), -(-self.V // self.constants["BV"])

    @property
    def strides(self) -> list[int]:
        return [n for x in (self.q, self.k, self.v) for n in x.stride()[:3]]

    @property
    def sizes(self) -> list[int]:
        return [self.T, self.H, self.J, self.R, self.E, self.chunks]

    def floats(self, *sizes: int) -> Tensor:
        return self.q.new_empty(self.B, *sizes, dtype=torch.float32)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
        """With those of the settings that the kernel has."""
        settings = {name: value for name, value in self.settings.items() if name in kernel.arg_names}
        kernel[grid](*args, **settings, **more, num_warps=self.tiles.warps, num_stages=1)

    @cached_property
    def faded(self) -> Tensor:
        faded = self.q.new_empty(2, self.B, self.J, self.T, self.gates, dtype=torch.float32)
        blocks = 1 if self.constants["NARROW"] else self.blocks_f
        self.launch(
            kernels.gates, (self.chunks, blocks, self.B * self.J), self.g, faded, *self.g.stride()[:3], self.T, self.J
        )
        return faded

    def sums(self, x: Tensor, y: Tensor, mass: Tensor | None, back: bool) -> Tensor:
        """What each chunk adds, [B, J, chunks, F, V + 1]."""
        out = self.floats(self.J, self.chunks, self.F, self.V + 1)
        self.launch(
            kernels.sums, (self.chunks, self.blocks_f * self.blocks_v, self.B * self.J), x, y,
            x if mass is None else mass, self.faded, self.segments, out, *x.stride()[:3], *y.stride()[:3], *self.sizes,
            BACK=back,
        )  # fmt: skip
        return out

    def scan(self, added: Tensor, first: Tensor | None, back: bool) -> tuple[Tensor, Tensor]:
        """(the state before each chunk, or its gradient behind it; the one at the other end)."""
        before, last = torch.empty_like(added), torch.empty_like(added[:, :, 0])
        kernels.scan[(-(-self.F * (self.V + 1) // SCANNED), self.B * self.J)](
            added, self.faded, added if first is None else first, self.segments, before, last, self.T, self.J,
            self.chunks, F=self.F, V=self.V, NARROW=self.constants["NARROW"], DOCUMENTS=self.settings["DOCUMENTS"],
            GIVEN=first is not None, BACK=back, BT=self.tiles.tokens, BLOCK=SCANNED,
        )  # fmt: skip
        return before, last

    def states(self, first: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.scan(self.sums(self.k, self.v, None, False), first, False)


def _first(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


@torch.library.custom_op("linearize::gated_linear_triton", mutates_args=())
def gated_linear_triton(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(numerator_BHTV, normaliser_BHT, state_BJFV1) in float32. log_gate [B, J, T, F or 1]."""
    call = _Call(q, k, v, log_gate, segments)
    before, last = call.states(_first(state))
    num, mass = call.floats(call.H, call.T, call.V), call.floats(call.H, call.T)
    call.launch(
        kernels.forward, (call.chunks, call.blocks_v, call.B * call.H), call.q, call.k, call.v, call.faded,
        call.segments, before, num, mass, *call.strides, *call.sizes,
    )  # fmt: skip
    return num, mass, last


@gated_linear_triton.register_fake
def _(q, k, v, log_gate, state, segments):
    (B, H, T, F), V = q.shape, v.shape[-1]
    sizes = ((B, H, T, V), (B, H, T), (B, k.shape[1], F, V + 1))
    return tuple(q.new_empty(*size, dtype=torch.float32) for size in sizes)


@torch.library.custom_op("linearize::gated_linear_triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
    d_num: Tensor,
    d_mass: Tensor,
    d_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log gates and the state."""
    call = _Call(q, k, v, log_gate, segments)
    B, J, T, V = call.B, call.J, call.T, call.V
    d_num, d_mass = d_num.contiguous(), d_mass.contiguous()
    # Adding chunks up once more costs less than keeping a state for each of them.
    before, _ = call.states(_first(state))
    behind, d_first = call.scan(call.sums(call.q, d_num, d_mass, True), d_state.contiguous(), True)
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(B, J, T, V)
    parts = call.blocks_f if call.constants["NARROW"] else 1  # of one gate each block of features has its own
    of_q, of_k = (q.new_empty(parts, B, heads, T, call.gates, dtype=torch.float32) for heads in (call.H, J))
    call.launch(
        kernels.back_q, (call.chunks, call.blocks_f, B * call.H), call.q, call.k, call.v, call.faded, call.segments,
        before, d_num, d_mass, d_q, of_q, *call.strides, *call.sizes,
    )  # fmt: skip
    call.launch(
        kernels.back_k, (call.chunks, call.blocks_f, B * J), call.q, call.k, call.v, call.faded, call.segments, before,
        behind, d_num, d_mass, d_k, of_k, *call.strides, *call.sizes,
    )  # fmt: skip
    of_q, of_k = (x[0] if parts == 1 else x.sum(0) for x in (of_q, of_k))
    d_g, block = torch.empty_like(of_k), min(call.constants["BF"], padded(call.gates))
    kernels.back_g[(call.chunks, -(-call.gates // block), B * J)](
        of_q, of_k, d_g, T, call.R, F=call.gates, BT=call.tiles.tokens, BF=block
    )
    call.launch(
        kernels.back_v, (call.chunks, call.blocks_v, B * J), call.q, call.k, call.faded, call.segments, behind, d_num,
        d_v, *call.strides[:6], *call.sizes,
    )  # fmt: skip
    d_v = d_v if call.E == 1 else d_v.unflatten(1, (-1, call.E)).sum(2)
    return d_q, d_k, d_v, d_g.to(log_gate.dtype), d_first


@_backward.register_fake
def _(q, k, v, log_gate, state, segments, d_num, d_mass, d_state):
    inputs = [x.new_empty(x.shape) for x in (q, k, v, log_gate)]
    return (*inputs, torch.empty_like(d_state, memory_format=torch.contiguous_format))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(True)


def _gradients(ctx: Any, d_num: Tensor, d_mass: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
    state = ctx.saved_tensors[4]
    *d, d_first = _backward(*ctx.saved_tensors, d_num, d_mass, d_state)
    return (*d, None if state is None else d_first.to(state.dtype), None)


gated_linear_triton.register_autograd(_gradients, setup_context=_setup)


def step_triton(
    q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One token, without gradients: (numerator, normaliser, new state)."""
    call = _Call(q, k, v, log_gate, None)
    num, mass, new = call.floats(call.H, 1, call.V), call.floats(call.H, 1), call.floats(call.J, call.F, call.V + 1)
    inputs, first = (call.q, call.k, call.v, call.g), _first(state)
    kernels.step[(-(-call.V // STEPPED), call.B * call.J)](
        *inputs, new if first is None else first, new, num, mass, *(n for x in inputs for n in x.stride()[:2]), call.H,
        call.J, call.R, call.E, F=call.F, V=call.V, NARROW=call.constants["NARROW"], GIVEN=first is not None,
        BF=padded(call.F), BV=STEPPED,
    )  # fmt: skip
    return num, mass, new
