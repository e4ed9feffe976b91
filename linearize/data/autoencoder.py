"""From latents to pictures: the autoencoder of a pipeline, as the pipeline itself uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.types import InputError, Unsupported

#: transformers that take latents packed two by two, [N, T, 4 C], with their places in `img_ids`
_PACKED = ("FluxTransformer2DModel", "ChromaTransformer2DModel")


class Decoder:
    """vae: an autoencoder of diffusers whose configuration says scaling_factor (and shift_factor): AutoencoderKL,
    AutoencoderDC. Raises Unsupported for others."""

    def __init__(self, vae: Any) -> None:
        self.vae, config = vae.eval(), vae.config
        if not isinstance(config.get("scaling_factor"), int | float):
            raise Unsupported(f"{type(vae).__name__} names no scaling_factor: pictures of its latents are not made yet")
        self.scale, self.shift = float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)
        self.channels = int(config["latent_channels"])

    @classmethod
    def of(cls, name: str | None, revision: str | None = None) -> Decoder | None:
        """That of a pipeline by folder or hub id; None where it has none: then it draws pixels. Raises InputError where
        it is named and cannot be read, Unsupported."""
        if name is None:
            return None
        folder = Path(name)
        try:
            import diffusers

            if folder.is_dir():
                file = folder / "model_index.json"
                index = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            else:
                index = dict(diffusers.DiffusionPipeline.load_config(name, revision=revision))
            kind = (index.get("vae") or [None, None])[1]
            if kind is None:
                return None
            return cls(
                getattr(diffusers, kind).from_pretrained(
                    name, subfolder="vae", revision=revision, torch_dtype=torch.float32, use_safetensors=True
                )
            )
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"the autoencoder of {name} cannot be read: {str(error).splitlines()[0]}") from error

    def takes(self, model: Any, clean: Tensor, shared: dict[str, Tensor]) -> bool:
        """Whether latents [N, ...] of this model can be decoded: planes, or packed ones with places."""
        if clean.ndim == 4:
            return clean.shape[1] == self.channels
        return type(model).__name__ in _PACKED and "img_ids" in shared and clean.shape[-1] == 4 * self.channels

    @torch.no_grad()
    def __call__(self, latents: Tensor, shared: dict[str, Tensor] | None = None, batch: int = 8) -> Tensor:
        """Pictures float32 [N, 3, H, W] in about -1 ... 1, on the CPU, of latents as the model takes them. shared: its
        inputs beside packed ones."""
        if latents.ndim == 3:
            assert shared is not None
            latents = unpack(latents, shared["img_ids"])
        place = next(self.vae.parameters())
        parts = (part.to(place.device, place.dtype) / self.scale + self.shift for part in latents.split(batch))
        return torch.cat([self.vae.decode(part, return_dict=False)[0].float().cpu() for part in parts])

    def apart(self, other: Decoder) -> float:
        """How far two decode the same noise to different pictures: distance over the norm of this one's, 0 to about
        1.4; infinite where they do not take the same latents."""
        if self.channels != other.channels:
            return float("inf")
        noise = torch.randn(1, self.channels, 4, 4, generator=torch.Generator().manual_seed(0))
        own, others = self(noise), other(noise)
        return float((own - others).norm() / own.norm()) if own.shape == others.shape else float("inf")


def unpack(packed_NTC: Tensor, ids_T3: Tensor) -> Tensor:
    """Planes [N, C / 4, 2 rows, 2 columns] of latents that Flux packs two by two; ids: (frame, row, column) of each."""
    rows, columns = (int(n) + 1 for n in ids_T3[:, 1:].max(0).values)
    blocks = packed_NTC.unflatten(1, (rows, columns)).unflatten(-1, (-1, 2, 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
