"""Feature maps by name: Phi(u) of u = x W + b, made non-negative. Shared by mixers and by ops that have them inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: features below this are raised to it
LEAST = 1e-12


def _split_softmax(u: Tensor) -> Tensor:
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1).clamp(min=LEAST)


def _exp(u: Tensor) -> Tensor:
    # Each half is shifted by its own extreme: a function of its own, not a stable form of raw exp.
    halves = [(u - u.amax(-1, keepdim=True)).exp(), (u.amin(-1, keepdim=True) - u).exp()]
    return torch.cat(halves, -1).clamp(min=LEAST)


def _joint_softmax(u: Tensor) -> Tensor:
    return torch.cat([2 * u, -2 * u], -1).softmax(-1)


# Gradients, from the features alone. Those raised to LEAST count as they are: a difference below LEAST.
def _split_softmax_back(phi: Tensor, d_phi: Tensor) -> Tensor:
    halves, d = phi.unflatten(-1, (2, -1)), d_phi.unflatten(-1, (2, -1))
    d = halves * d
    d = d - halves * d.sum(-1, keepdim=True)
    return d[..., 0, :] - d[..., 1, :]


def _exp_back(phi: Tensor, d_phi: Tensor) -> Tensor:
    halves = phi.unflatten(-1, (2, -1))
    d = halves * d_phi.unflatten(-1, (2, -1))
    extreme = (halves == 1).to(d.dtype)
    # Features of padding are 0, and none is extreme.
    d = d - extreme * (d.sum(-1, keepdim=True) / extreme.sum(-1, keepdim=True).clamp(min=1))
    return d[..., 0, :] - d[..., 1, :]


def _joint_softmax_back(phi: Tensor, d_phi: Tensor) -> Tensor:
    d = phi * d_phi
    d = (d - phi * d.sum(-1, keepdim=True)).unflatten(-1, (2, -1))
    return 2 * (d[..., 0, :] - d[..., 1, :])


def _relu_back(phi: Tensor, d_phi: Tensor) -> Tensor:
    return d_phi * (phi > 0)


def _elu_back(phi: Tensor, d_phi: Tensor) -> Tensor:
    return d_phi * phi.clamp(max=1)  # exp(u) below u = 0, where the feature is exp(u)


class Map(NamedTuple):
    """run: u -> features; back: (features, their gradient) -> that of u. factor: features per column of W. bias:
    whether there is a b."""

    run: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor], Tensor]
    factor: int
    bias: bool


MAPS: dict[str, Map] = {
    "split_softmax": Map(_split_softmax, _split_softmax_back, 2, False),  # LoLCATs' softmax_dim: Hedgehog's default
    "exp": Map(_exp, _exp_back, 2, False),  # LoLCATs' exp_dim
    "joint_softmax": Map(_joint_softmax, _joint_softmax_back, 2, True),  # fla, MAD, Zoology; there one W for all heads
    "t2r": Map(F.relu, _relu_back, 1, True),  # T2R: relu(xW + b)
    "relu": Map(F.relu, _relu_back, 1, False),
    "elu": Map(lambda u: F.elu(u) + 1, _elu_back, 1, False),
}
