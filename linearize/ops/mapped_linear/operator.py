"""`mapped_linear` as operators of torch.library: opaque to compilers, shapes for tracing, a backward operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linearize.ops._maps import MAPS


class Passes(NamedTuple):
    """An implementation. forward(*inputs, name, key_heads, eps, keep) -> (output, mass, state, kept);
    backward(*inputs but the state, output, mass, kept, d_output, d_mass, d_state, name, key_heads, eps) -> gradients of
    q, k, v, W_q, W_k, b_q, b_k and state, empty where there is none; keeps(tokens): how many states `kept` holds."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    keeps: Callable[[Any], Any]


def _high(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def build(name: str, passes: Passes) -> Callable[..., tuple[Tensor, ...]]:
    """The operator linearize::mapped_linear_NAME and its backward."""

    @torch.library.custom_op(f"linearize::mapped_linear_{name}", mutates_args=())
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w_q: Tensor | None,
        w_k: Tensor | None,
        b_q: Tensor | None,
        b_k: Tensor | None,
        valid: Tensor | None,
        segments: Tensor | None,
        state: Tensor | None,
        map: str,
        key_heads: int,
        eps: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return passes.forward(q, k, v, w_q, w_k, b_q, b_k, valid, segments, state, map, key_heads, eps, keep)

    @run.register_fake
    def _(q, k, v, w_q, w_k, b_q, b_k, valid, segments, state, map, key_heads, eps, keep):
        B, H, T, K = q.shape
        F, V = (K if w_q is None else w_q.shape[-1]) * MAPS[map].factor, v.shape[-1]
        high = _high(q)
        return (
            q.new_empty(B, H, T, V),
            q.new_empty(B, H, T, dtype=high),
            q.new_empty(B, key_heads, F, V + 1, dtype=high),
            q.new_empty(B, key_heads, passes.keeps(T) if keep else 0, F, V + 1, dtype=high),
        )

    @torch.library.custom_op(f"linearize::mapped_linear_{name}_backward", mutates_args=())
    def back(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        w_q: Tensor | None,
        w_k: Tensor | None,
        b_q: Tensor | None,
        b_k: Tensor | None,
        valid: Tensor | None,
        segments: Tensor | None,
        output: Tensor,
        mass: Tensor,
        kept: Tensor,
        d_output: Tensor,
        d_mass: Tensor,
        d_state: Tensor,
        map: str,
        key_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        inputs = (q, k, v, w_q, w_k, b_q, b_k, valid, segments)
        return passes.backward(*inputs, output, mass, kept, d_output, d_mass, d_state, map, key_heads, eps)

    @back.register_fake
    def _(q, k, v, w_q, w_k, b_q, b_k, valid, segments, output, mass, kept, d_output, d_mass, d_state, map, *rest):
        def like(w: Tensor | None) -> Tensor:
            return q.new_empty(0 if w is None else w.shape, dtype=_high(q))

        inputs = [x.new_empty(x.shape) for x in (q, k, v)]
        return (*inputs, like(w_q), like(w_k), like(b_q), like(b_k), torch.empty_like(d_state))

    def setup(ctx, inputs, output) -> None:
        *tensors, ctx.map, ctx.key_heads, ctx.eps, keep = inputs
        if not keep:
            raise AssertionError(f"mapped_linear_{name}: gradients are wanted of a call that kept no states")
        ctx.save_for_backward(*tensors[:9], *(output[i] for i in (0, 1, 3)))
        ctx.state_dtype = None if tensors[9] is None else tensors[9].dtype
        ctx.set_materialize_grads(True)

    def gradients(ctx, d_output, d_mass, d_state, _):
        *inputs, output, mass, kept = ctx.saved_tensors
        d = back(*inputs, output, mass, kept, d_output, d_mass, d_state, ctx.map, ctx.key_heads, ctx.eps)
        maps = [None if w is None else g.to(w.dtype) for w, g in zip(inputs[3:7], d[3:7], strict=True)]
        state = None if ctx.state_dtype is None else d[7].to(ctx.state_dtype)
        return (*d[:3], *maps, None, None, state, None, None, None, None)

    run.register_autograd(gradients, setup_context=setup)
    return run
