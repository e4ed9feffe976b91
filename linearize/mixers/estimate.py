"""SEA's estimator: a row of attention, guessed in linear time as K pixels, from the output of a linear attention.

Lee et al., "SEA" (2310.01777) section 3.1: linear attention over [place, v], a layer on what it read and the token's
own value, an image of T rows from all heads together, two convolutions, pixels. Ours: learned feature maps in place of
FAVOR+'s random ones; places are frequencies turned back by the query's own place (causal) or borders of L in equal
parts (bidirectional), without tables that end; a bias by distance and by place, started at 1 / (1 + distance); pixels
are shuffled out of channels where the paper repeats them, no row is skipped, and pixels that cover no key get nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.mixers.parts import FeatureMap, FeatureMapName
from linearize.ops._dispatch import compute_dtype
from linearize.ops.bidirectional import bidirectional
from linearize.ops.linear import linear
from linearize.ops.topk.pixels import keys_of
from linearize.types import SiteShape, State, StateSpec

#: pixels that the last layer makes of one column of the image
_UP = 4
#: rows before it that a convolution reads, causal
_REACH = 4
#: entries of a bias, two for each doubling of the distance
_BIAS = 32


class Span(NamedTuple):
    """Where the tokens of a call stand in their documents: rank_NT (from 0), length_NT (keys that each sees), tokens_N
    (how many are real) and valid_NT (which; None: all). N may be 1 for all rows alike."""

    rank: Tensor
    length: Tensor
    tokens: Tensor
    valid: Tensor | None


class Estimate(NamedTuple):
    """log_NHTP: log of the estimate, which adds up to 1 over the pixels (-inf where one covers no key). gates_NHT2: of
    the sparse part against nothing, and against the mean."""

    log: Tensor
    gates: Tensor
    state: State


class Estimator(nn.Module):
    """See the top of this file. Parameters of all heads together have 1 on axis 0. All are of unit size and scaled
    where they are used, so that one learning rate serves them."""

    def __init__(self, shape: SiteShape, width: int, feature_map: FeatureMapName, features: int | None) -> None:
        super().__init__()
        H, K, V = shape.heads, shape.key_dim, shape.value_dim
        self.shape, self.width, self.columns, self.places = shape, width, width // _UP, 2 * max(1, K // 2)
        self.map_q, self.map_k = (FeatureMap(feature_map, H, K, features) for _ in range(2))
        noise = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes).normal_(generator=noise))

        inner, C = 2 * K, 2 * H
        self.enter_HXE = normal(H, 2 * self.places + 2 * V, inner)
        self.gain_HE, self.shift_HE = nn.Parameter(torch.ones(H, inner)), nn.Parameter(torch.zeros(H, inner))
        self.image_HEC = normal(H, inner, 2 * self.columns)
        self.conv_1ORCX, self.conv2_1ORCX = normal(1, C, 3, C, 3), normal(1, C, 3, C, 3)
        self.bias_1O, self.bias2_1O = nn.Parameter(torch.zeros(1, C)), nn.Parameter(torch.zeros(1, C))
        self.pixels_1OC = normal(1, _UP * H, C)
        slope = 0.0 if shape.image else -math.log(2) / 2
        fall = slope * torch.arange(_BIAS, dtype=torch.float32).repeat(1 if shape.causal else 2)
        self.near_HN = nn.Parameter(fall.repeat(H, 1))
        self.first_HN = nn.Parameter(torch.zeros(H, _BIAS))
        self.gate_HE2, self.gate_bias_H2 = nn.Parameter(torch.zeros(H, inner, 2)), nn.Parameter(torch.full((H, 2), 4.0))

    def forward(self, q_NHTK: Tensor, k_NGTK: Tensor, v_NGTV: Tensor, span: Span, state: State = ()) -> Estimate:
        dtype = compute_dtype(q_NHTK, k_NGTK, v_NGTV)
        q, k, v = q_NHTK.to(dtype), k_NGTK.to(dtype), v_NGTV.to(dtype)
        group = self.shape.group
        read, sums = self._read(q, k.repeat_interleave(group, 1), v, span, state)
        own = v.repeat_interleave(group, 1)
        here = hats(span.length.to(dtype).log2(), self.places) if self.shape.causal else self._place(span, dtype)
        enter = _scaled(self.enter_HXE, dtype)
        size = read.shape[-1] + own.shape[-1]
        x = torch.cat([read, own], -1) @ enter[:, :size] + here[:, None] @ enter[:, size:]
        x = F.layer_norm(x, x.shape[-1:]) * self.gain_HE.to(dtype)[:, None] + self.shift_HE.to(dtype)[:, None]
        x = F.gelu(x)
        gates = (x.detach() @ _scaled(self.gate_HE2, dtype) + self.gate_bias_H2.to(dtype)[:, None]).sigmoid()
        image = (x @ _scaled(self.image_HEC, dtype)).unflatten(-1, (2, self.columns))
        image = F.layer_norm(image, image.shape[-1:]).transpose(2, 3).flatten(1, 2)
        rows: list[Tensor] = []
        layers = ((self.conv_1ORCX, self.bias_1O), (self.conv2_1ORCX, self.bias2_1O))
        for (weight, bias), kept in zip(layers, state[1:3] or (None, None), strict=True):
            taps, kept = self._taps(image, kept, span)
            weight = (weight[0].to(dtype) / math.sqrt(weight[0, 0].numel())).flatten(1, 2)[:, :, None]
            image = F.conv2d(taps, weight, bias[0].to(dtype), padding=(0, 1)).relu()
            rows += [] if kept is None else [kept]
        mixed = self.pixels_1OC[0].to(dtype) / math.sqrt(image.shape[1])
        fine = torch.einsum("oc,nctw->notw", mixed, image).unflatten(1, (self.shape.heads, _UP))
        fine = fine.permute(0, 1, 3, 4, 2).flatten(3)  # the pixels of a column side by side
        logits = fine + self._bias(span, dtype)
        logits = logits.masked_fill((keys_of(span.length, self.width) == 0)[:, None], -torch.inf)
        return Estimate(logits.log_softmax(-1), gates, (*sums, *rows))

    def _read(self, q: Tensor, k: Tensor, v: Tensor, span: Span, state: State) -> tuple[Tensor, State]:
        """(what a linear attention reads: where it looked and what it found [N, H, T, places + V], its sums)."""
        phi_q, phi_k = self.map_q(q), self.map_k(k)
        if span.valid is not None:
            phi_k = phi_k * span.valid[:, None, :, None]
        place = self._place(span, q.dtype)
        values = torch.cat([place[:, None].expand(len(v), v.shape[1], -1, -1), v], -1)
        if not self.shape.causal:
            out = bidirectional(phi_q, phi_k, values)
            return out.numerator / (out.normaliser + 1e-12)[..., None], ()
        out = linear(phi_q, phi_k, values, state=state[0] if state else None)
        found = out.numerator / (out.normaliser + 1e-12)[..., None]
        half = self.places // 2
        cos, sin = found[..., :half], found[..., half : self.places]
        c, s = (x[:, None] for x in place.chunk(2, -1))
        return torch.cat([cos * c + sin * s, cos * s - sin * c, found[..., self.places :]], -1), (out.state,)

    def _place(self, span: Span, dtype: torch.dtype) -> Tensor:
        """What a key says of its place, [N, T, places]."""
        if not self.shape.causal:
            return hats((span.rank.to(dtype) + 0.5) / span.length * self.places - 0.5, self.places)
        half = self.places // 2
        rates = 4096.0 ** -(torch.arange(half, device=span.rank.device, dtype=torch.float64) / max(1, half - 1))
        angle = span.rank[..., None] * rates
        return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)

    def _taps(self, image_NCTW: Tensor, kept: Tensor | None, span: Span) -> tuple[Tensor, Tensor | None]:
        """Three rows for each, as channels; and the last rows for the next call. Causal: its own, 2 and 4 before."""
        T = image_NCTW.shape[2]
        if not self.shape.causal:
            x = image_NCTW if span.valid is None else image_NCTW * span.valid[:, None, :, None]
            x = F.pad(x, (0, 0, 1, 1))
            return torch.cat([x[:, :, i : i + T] for i in range(3)], 1), None
        if kept is None:
            kept = image_NCTW.new_zeros(*image_NCTW.shape[:2], _REACH, image_NCTW.shape[3])
        x = torch.cat([kept.to(image_NCTW.dtype), image_NCTW], 2)
        return torch.cat([x[:, :, i : i + T] for i in (0, 2, 4)], 1), last_rows(x, span.tokens, _REACH)

    def _bias(self, span: Span, dtype: torch.dtype) -> Tensor:
        """[N, H, T, P] by the distance to a pixel's middle, and by its place."""
        middle_P = torch.arange(self.width, device=span.rank.device, dtype=dtype) + 0.5
        at = (middle_P * (span.length[..., None].to(dtype) / self.width) - 0.5).clamp(min=0)
        distance = span.rank[..., None] - at
        near = _lookup(self.near_HN.to(dtype)[:, :_BIAS], distance.clamp(min=0))
        if not self.shape.causal:
            after = _lookup(self.near_HN.to(dtype)[:, _BIAS:], (-distance).clamp(min=0))
            near = torch.where((distance >= 0)[:, None], near, after)
        return near + _lookup(self.first_HN.to(dtype), at)

    def state_spec(self) -> list[StateSpec]:
        s = self.shape
        sums = (-1, s.heads, self.map_q.features, self.places + s.value_dim + 1)
        rows = (-1, 2 * s.heads, _REACH, self.columns)
        return [
            StateSpec("sums", sums, torch.float32, 1),
            StateSpec("rows", rows, torch.float32, None),
            StateSpec("rows2", rows, torch.float32, None),
        ]

    def flops(self) -> float:
        """Of one token."""
        s, N = self.shape, self.map_q.features
        maps = 4 * s.key_dim * self.map_q.columns * s.heads
        sums = 4 * N * (self.places + s.value_dim + 1) * s.heads * (1 if not s.causal else 2)
        layers = 2 * (self.enter_HXE.numel() + self.image_HEC.numel() + self.gate_HE2.numel())
        images = 2 * self.columns * (2 * self.conv_1ORCX.numel() + self.pixels_1OC.numel())
        return float(maps + sums + layers + images + 8 * s.heads * self.width)


def hats(x: Tensor, count: int) -> Tensor:
    """x between two of the whole numbers below `count`, as its shares of both: [..., count]."""
    whole = torch.arange(count, device=x.device, dtype=x.dtype)
    return (1 - (x.clamp(0, count - 1)[..., None] - whole).abs()).clamp(min=0)


def last_rows(x_NCST: Tensor, count_N: Tensor, reach: int) -> Tensor:
    """The last `reach` real rows of each document (axis 2), behind which padding may stand; x begins with `reach` kept
    ones."""
    at_NR = count_N[:, None] + torch.arange(reach, device=x_NCST.device)
    return x_NCST.gather(2, at_NR[:, None, :, None].expand(len(x_NCST), x_NCST.shape[1], -1, x_NCST.shape[3]))


def _scaled(weight_HXE: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_HXE.to(dtype) / math.sqrt(weight_HXE.shape[1])


def _lookup(table_HN: Tensor, distance_NTP: Tensor) -> Tensor:
    """Between the entries of a bias, two for each doubling of 1 + distance: [N, H, T, P]. As a product with hats, 1,024
    rows at a time: gradients of a gather would cost more than all the rest."""
    pieces = [table_HN @ hats(2 * (1 + d).log2(), _BIAS).flatten(1, 2).mT for d in distance_NTP.split(1024, 1)]
    return torch.cat([piece.unflatten(2, (-1, distance_NTP.shape[2])) for piece in pieces], 2)
