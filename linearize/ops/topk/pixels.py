"""Rows of T keys seen as K pixels: which keys a pixel covers, and the choice of a row's best. SEA (2310.01777), 3.2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_of(place: Tensor, length: Tensor, width: int) -> Tensor:
    """The pixel, of `width`, that covers the key at `place` of `length` keys: floor((p + 1/2) / L K), its upper border
    its own. In whole numbers, so that no rounding parts two calls."""
    return ((2 * place + 1) * width - 1) // (2 * length)


def first_key(pixel: Tensor, length: Tensor, width: int) -> Tensor:
    """The first key that `pixel` covers: round(b L / K)."""
    return (2 * length * pixel + width) // (2 * width)


def keys_of(length: Tensor, width: int) -> Tensor:
    """How many of `length` keys each pixel covers, [..., K]: min(K, L) of them cover any."""
    border = torch.arange(width + 1, device=length.device)
    return first_key(border, length[..., None], width).diff(dim=-1)


def shares(density: Tensor, length: Tensor, borders: Tensor) -> Tensor:
    """How much of `density` [..., K] over L keys lies between neighbours of `borders` (keys, J + 1 of them): [..., J].
    From the middle of a pixel to the next it changes evenly, and goes on so at both ends: stretches inside one pixel
    are told apart."""
    width, (first, last) = density.shape[-1], (density[..., :2], density[..., -2:].flip(-1))
    ends = (2 * x[..., :1] - x[..., 1:] for x in (first, last))
    density = torch.cat([next(ends), density, next(ends)], -1)
    total = F.pad(((density[..., 1:] + density[..., :-1]) / 2).cumsum(-1), (1, 0))
    at = (borders / length[..., None].to(density.dtype) * width).clamp(max=width) + 0.5
    low = at.floor().clamp(max=width).long()
    low, at = torch.broadcast_tensors(low, at)
    low = low.expand(*total.shape[:-1], -1)
    left, right, part = density.gather(-1, low), density.gather(-1, low + 1), at - low
    return (total.gather(-1, low) + part * (left + (right - left) * part / 2)).diff(dim=-1)


def keep_best(score: Tensor, count: Tensor) -> Tensor:
    """Which `count` [...] entries of each row of `score` [..., M] are the largest: bool."""
    most = min(int(count.max()), score.shape[-1])
    best = score.topk(most, dim=-1).indices
    kept = (torch.arange(most, device=score.device) < count[..., None]).expand(best.shape)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, kept)
