"""Causal linear attention with its feature maps inside: `mapped_linear`. Equations: Hedgehog (2402.04347) section 4,
README.md here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, is_grad_enabled
from torch.compiler import is_exporting

from linearize.ops._dispatch import Implementation, choose, compute_dtype, kernels_refuse
from linearize.ops.linear import linear
from linearize.ops.mapped_linear.backward import mapped_linear_torch
from linearize.ops.mapped_linear.reference import features, mapped_linear_reference
from linearize.ops.mapped_linear.step import step

__all__ = ["IMPLEMENTATIONS", "MappedOutput", "features", "mapped_linear"]


class MappedOutput(NamedTuple):
    """output_BHTV = numerator / (mass + eps) in q's dtype, mass_BHT, and state_BJFV1 after the last token."""

    output: Tensor
    mass: Tensor
    state: Tensor


def _torch(*inputs, **settings):
    q, k, v, w_q, w_k, b_q, b_k, valid, segments, state = inputs
    if is_exporting():  # plain operations, and no loop that would fix the length
        return _composed(*inputs, **settings)
    if q.shape[2] == 1 and segments is None:
        return step(q, k, v, (w_q, w_k), (b_q, b_k), valid, state, **settings)
    return mapped_linear_torch(*inputs, *settings.values(), _trains(inputs))[:3]


def _trains(inputs) -> bool:
    return is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _triton(*inputs, **settings):
    from linearize.ops.mapped_linear.triton import mapped_linear_triton, step_triton

    q, k, v, w_q, w_k, b_q, b_k, valid, segments, state = inputs
    if q.shape[2] == 1 and segments is None and not _trains(inputs):
        return step_triton(q, k, v, (w_q, w_k), (b_q, b_k), valid, state, **settings)
    return mapped_linear_triton(*inputs, *settings.values(), _trains(inputs))[:3]


def _triton_refuses(q, k, v, w_q, *rest) -> str | None:
    sizes = (q.shape[-1], v.shape[-1], *(() if w_q is None else (w_q.shape[-1],)))
    reason = kernels_refuse(q, *sizes)
    if reason is None and q.is_cuda and max(sizes) > 64:
        from linearize.ops._triton import roomy

        if not roomy(q.device):
            return f"head sizes above 64 need a device with more shared memory, and these are {max(sizes)}"
    return reason


def _composed(q, k, v, w_q, w_k, b_q, b_k, valid, segments, state, *, name, key_heads, eps):
    dtype = compute_dtype(q)
    phi_q = features(q.to(dtype), name, w_q, b_q)
    k, v = k.to(dtype), v.to(dtype)
    phi_k = features(k.repeat_interleave(key_heads // k.shape[1], 1) if key_heads != k.shape[1] else k, name, w_k, b_k)
    if valid is not None:
        phi_k = phi_k * valid[:, None, :, None]
    out = linear(phi_q, phi_k, v, state=state, segments_BT=segments, impl="torch")
    return (out.numerator / (out.normaliser + eps)[..., None]).to(q.dtype), out.normaliser, out.state


IMPLEMENTATIONS = (
    Implementation("triton", _triton, _triton_refuses, device="cuda"),
    Implementation("torch", _torch),
    Implementation("reference", mapped_linear_reference),
)


def mapped_linear(
    q_BHTK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    name: str,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    key_heads: int | None = None,
    valid_BT: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    eps: float = 1e-12,
    impl: str = "auto",
) -> MappedOutput:
    """Causal linear attention over phi_q = Phi(q W_q + b_q) and phi_k, normalised by the sum of its weights + eps.

    name: Phi, of ops/_maps.py. weights: W_q [H, K, C] and W_k [J, K, C], None for maps without; biases [H, C], [J, C].
    k and v have G heads, J = key_heads (None: H) is a multiple of G and divides H: each key head has a map and a
    state, [B, J, F, V+1] in float32 (float64 for float64 inputs), its normaliser in the last column. valid_BT: False
    at padding, which is in no sum. segments_BT: document numbers; documents never read each other, `state` belongs to
    the first one. Raises InputError for an unknown or refusing `impl`.
    """
    J = q_BHTK.shape[1] if key_heads is None else key_heads
    inputs = (q_BHTK, k_BGTK, v_BGTV, *weights, *biases, valid_BT, segments_BT, state)
    run = choose("mapped_linear", IMPLEMENTATIONS, impl, *inputs).run
    return MappedOutput(*run(*inputs, name=name, key_heads=J, eps=eps))
