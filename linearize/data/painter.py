"""Images where none are named: drawn from a mixture of Gaussians, fitted to what the embedded vision teacher was
trained on and shipped beside it. They look like its garments, smoothed; their pixels are nobody's photograph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linearize.data.reading import first_line
from linearize.storage import write_atomic
from linearize.types import StorageError

FILE = "painter.safetensors"
PART = 1024  # images drawn at once


@dataclass(frozen=True)
class Painter:
    """x = mean_P + (means_CD[c] + factors_CDD[c] e) basis_DP, e standard normal, c drawn by weights_C; clamped to
    0 .. 255. size: (channels, rows, columns), whose product is P."""

    size: tuple[int, int, int]
    mean: Tensor
    basis: Tensor
    weights: Tensor
    means: Tensor
    factors: Tensor

    @classmethod
    def fit(cls, images_NCHW: Tensor, groups: Sequence[Tensor], width: int) -> Painter:
        """One Gaussian per group (rows of images_NCHW, uint8) in the space of the `width` first principal axes."""
        x_NP = images_NCHW.flatten(1).float()
        mean = x_NP.mean(0)
        basis = torch.linalg.eigh((x_NP - mean).T @ (x_NP - mean)).eigenvectors[:, -width:].T
        z_ND = (x_NP - mean) @ basis.T
        parts = [z_ND[rows] for rows in groups]
        factors = []
        for part in parts:
            spread = torch.cov(part.T)
            factors.append(torch.linalg.cholesky(spread + 1e-3 * spread.diagonal().mean() * torch.eye(width)))
        weights = torch.tensor([float(len(part)) for part in parts])
        size = tuple(images_NCHW.shape[1:])
        return cls(
            size, mean, basis, weights / weights.sum(), torch.stack([p.mean(0) for p in parts]), torch.stack(factors)
        )

    def draw(self, count: int, seed: int) -> Tensor:
        """uint8 [count, C, H, W]; the first n of a longer draw are those of a shorter one."""
        parts = []
        for start in range(0, count, PART):
            draw = torch.Generator().manual_seed(seed * 1_000_003 + start)
            kind_N = torch.multinomial(self.weights, PART, replacement=True, generator=draw)
            noise_ND = torch.randn(PART, self.basis.shape[0], generator=draw)
            z_ND = self.means[kind_N] + torch.einsum("nde,ne->nd", self.factors[kind_N], noise_ND)
            parts.append((self.mean + z_ND @ self.basis).clamp(0, 255).round().to(torch.uint8))
        return torch.cat(parts)[:count].view(-1, *self.size)

    def save(self, folder: Path) -> None:
        """float16, the factors' lower triangles."""
        from safetensors.torch import save

        rows, columns = torch.tril_indices(*self.factors.shape[1:])
        kept = {"mean": self.mean, "basis": self.basis, "weights": self.weights, "means": self.means}
        kept["factors"] = self.factors[:, rows, columns]
        tensors = {name: value.half().contiguous() for name, value in kept.items()}
        write_atomic(folder / FILE, save(tensors | {"size": torch.tensor(self.size)}))

    @classmethod
    def beside(cls, folder: Path | None) -> Painter | None:
        """The one in a model's folder; None where there is none. Raises StorageError."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if folder is None or not (folder / FILE).is_file():
            return None
        try:
            found = load_file(folder / FILE)
            size = found.pop("size").tolist()
            found = {name: value.float() for name, value in found.items()}
            width = found["basis"].shape[0]
            rows, columns = torch.tril_indices(width, width)
            factors = torch.zeros(len(found["weights"]), width, width)
            factors[:, rows, columns] = found.pop("factors")
            return cls(tuple(size), factors=factors, **found)
        except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
            raise StorageError(f"{folder / FILE}: not a readable painter ({first_line(error)}); delete it") from None
