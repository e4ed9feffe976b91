"""Networks that look at drawings, and distances of two sets of drawings by what they see.

Fréchet distance of Gaussians (the formula of 1706.08500), kernel distance (1801.01401), recall (1904.06991) and
coverage (2002.09797). None of the networks is Inception: no figure here is an FID, and none compares with one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linearize.types import InputError

#: the embedded image teacher
EMBEDDED = Path(__file__).parents[1] / "teachers" / "image"
NEAREST = 5  # neighbours of recall and coverage


class Judge:
    """A classifier of images, from a folder or hub id (None: the embedded image teacher), that looks at drawings in
    -1 ... 1 less `crop` pixels at each edge. name: what a report calls it."""

    def __init__(self, name: str | None = None, crop: int = 0) -> None:
        from transformers import AutoModelForImageClassification

        where = Path(name) if name is not None else EMBEDDED
        self.name = "the embedded image teacher" if name is None else where.name
        self.crop = crop
        try:
            self.model: Any = AutoModelForImageClassification.from_pretrained(
                str(where), dtype=torch.float32, use_safetensors=True
            ).eval()
        except (OSError, ValueError) as error:
            raise InputError(f"eval.judge: {where} is no classifier of images: {str(error).splitlines()[0]}") from error
        said = where / "preprocessor_config.json"
        facts = json.loads(said.read_text()) if said.is_file() else {}
        self.mean, self.std = (torch.tensor(facts.get(k, [0.5]))[:, None, None] for k in ("image_mean", "image_std"))

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 100) -> tuple[Tensor, Tensor]:
        """(logits [N, classes], features [N, E]) of drawings [N, C, H, W]; a feature is the first token's."""
        seen, found = [], []
        hook = self.model.base_model.register_forward_hook(lambda m, a, out: seen.append(out.last_hidden_state[:, 0]))
        try:
            for part in images.split(batch):
                found.append(self.model(pixel_values=self._sized(part)).logits)
        finally:
            hook.remove()
        return torch.cat(found), torch.cat(seen)

    def _sized(self, images: Tensor) -> Tensor:
        config, c = self.model.config, self.crop
        x = images[..., c : images.shape[-2] - c, c : images.shape[-1] - c]
        if x.shape[1] != config.num_channels:
            x = x.mean(1, keepdim=True).expand(-1, config.num_channels, -1, -1)
        side = config.image_size
        if tuple(x.shape[-2:]) != (side, side):
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return ((x + 1) / 2 - self.mean) / self.std


class Random:
    """A small convolutional network with weights of a fixed seed: it was trained to see nothing, so it favours none."""

    name = "a fixed random network"

    def __init__(self, channels: int) -> None:
        generator = torch.Generator().manual_seed(20261125)
        sizes = [(channels, 32), (32, 64), (64, 64)]
        self.weights = [torch.randn(b, a, 3, 3, generator=generator) * (2 / (9 * a)) ** 0.5 for a, b in sizes]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [N, 64]."""
        x = images
        for weight in self.weights:
            x = F.conv2d(x, weight, stride=2, padding=1).relu()
        return x.mean((2, 3))


# ------------------------------------------------------------------------------------------------ distances of two sets
def frechet(a_NE: Tensor, b_NE: Tensor) -> float:
    """Fréchet distance of the Gaussians with the moments of two sets of features, in double precision."""
    a, b = a_NE.double(), b_NE.double()
    root = _root(a.T.cov())
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    trace = a.T.cov().trace() + b.T.cov().trace() - 2 * cross
    return float((a.mean(0) - b.mean(0)).square().sum() + trace)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def kernel_distance(a_NE: Tensor, b_NE: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / E + 1)^3; about 0, also below, for one source.
    Raises InputError for fewer than two drawings."""
    a, b = a_NE.double(), b_NE.double()
    if min(len(a), len(b)) < 2:
        raise InputError("a distance of sets needs two drawings at least")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def recall_coverage(real_NE: Tensor, drawn_ME: Tensor, nearest: int = NEAREST) -> tuple[float, float]:
    """(recall: share of the real that lie as near to a drawn one as its own neighbours do, coverage: share of the real
    that have a drawn one among their own nearest)."""
    real, drawn = real_NE.double(), drawn_ME.double()
    k = min(nearest, len(real) - 1, len(drawn) - 1)
    apart = torch.cdist(real, drawn)
    around_drawn = torch.cdist(drawn, drawn).kthvalue(k + 1, dim=1).values  # its own 0 is the first
    around_real = torch.cdist(real, real).kthvalue(k + 1, dim=1).values
    recall = (apart <= around_drawn[None]).any(1)
    coverage = apart.min(1).values <= around_real
    return float(recall.double().mean()), float(coverage.double().mean())


# ------------------------------------------------------------------------------------------------------ pairs of images
def psnr(a_N: Tensor, b_N: Tensor, most: float = 100.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in -1 ... 1, [N]; equal ones have `most`."""
    error = (a_N - b_N).double().square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp(min=1e-12))).clamp(max=most)


def ssim(a_NCHW: Tensor, b_NCHW: Tensor, side: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images in -1 ... 1, [N]; window of `side`, less on smaller images."""
    a, b = ((x.double() + 1) / 2 for x in (a_NCHW, b_NCHW))
    side = min(side, *a.shape[-2:])
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    row = torch.exp(-(at**2) / (2 * sigma**2))
    window = torch.outer(row, row)
    weight = (window / window.sum()).expand(a.shape[1], 1, side, side)

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, groups=x.shape[1])

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return value.flatten(1).mean(1)


def features_of(network: nn.Module | Random | Judge, images: Tensor) -> Tensor:
    """[N, E]"""
    out = network(images)
    return out[1] if isinstance(out, tuple) else out
