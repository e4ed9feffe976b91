"""Clean latents (or pixels) with the conditions they were made under and the seeds of their noise."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.data.examples import Examples
from linearize.types import InputError


class Latents(Examples):
    """What a diffusion model is trained on.

    clean [N, ...] as the transformer takes them, float32. each: conditions by the name of the model's input, one row
    per example; shared: inputs that are the same for all, without a batch axis. seeds int64 [N] of the noise they were
    drawn from. positions: patches of one. order: which of the rows are these examples, of a view.
    """

    def __init__(
        self,
        clean: Tensor,
        each: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        seeds: Tensor,
        positions: int,
        settings: Mapping[str, Any],
        order: Tensor | None = None,
    ) -> None:
        self.clean, self.each, self.shared, self.seeds = clean, dict(each), dict(shared), seeds
        self.positions, self.settings = positions, dict(settings)
        self.order = torch.arange(len(clean)) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = int(self.order[index])
        return {"hidden_states": self.clean[row], **{name: rows[row] for name, rows in self.each.items()}}

    @property
    def tokens(self) -> int:
        return len(self) * self.positions

    @property
    def length(self) -> int:
        return self.positions

    @property
    def digest(self) -> str:
        total = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        for name, tensor in sorted({"": self.clean, "seeds": self.seeds, **self.each}.items()):
            total.update(f"{name}{tuple(tensor.shape)}".encode() + tensor[self.order].contiguous().numpy().tobytes())
        for name, tensor in sorted(self.shared.items()):
            total.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return total.hexdigest()

    def _view(self, order: Tensor) -> Latents:
        return Latents(self.clean, self.each, self.shared, self.seeds, self.positions, self.settings, order)

    def take(self, start: int, stop: int | None = None) -> Latents:
        order = self.order[start:stop]
        if not len(order):
            raise InputError(f"no examples {start} to {stop} among {len(self)}")
        return self._view(order)

    def hold_out(self, tokens: int) -> tuple[Latents, Latents]:
        held = math.ceil(tokens / self.positions)
        if held >= len(self):
            raise InputError(
                f"{len(self)} drawings are too few to hold out {held} of them: draw more (data.self_tokens), or lower "
                "data.valid_tokens"
            )
        return self._view(self.order[:-held]), self._view(self.order[-held:])

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return batch | self.shared

    def conditions(self) -> dict[str, Tensor]:
        """The conditions of these examples, [N, ...]."""
        return {name: rows[self.order] for name, rows in self.each.items()}

    def check(self, config: Any, *, allow_longer: bool = False) -> None:
        channels = config.in_channels
        found = self.clean.shape[1 if self.clean.ndim > 3 else -1]
        if found != channels:
            raise InputError(f"these drawings have {found} channels, the model takes {channels}: draw with this model")

    # ---------------------------------------------------------------------------------------------------- on disk
    def pack(self) -> dict[str, Tensor]:
        """These examples as tensors to keep."""
        kept = {"clean": self.clean[self.order], "seeds": self.seeds[self.order]}
        kept |= {f"each.{name}": rows[self.order] for name, rows in self.each.items()}
        kept |= {f"shared.{name}": tensor for name, tensor in self.shared.items()}
        return {name: tensor.contiguous() for name, tensor in kept.items()}

    @classmethod
    def unpack(cls, kept: Mapping[str, Tensor], positions: int, settings: Mapping[str, Any]) -> Latents:
        parts = {kind: {n.removeprefix(kind): t for n, t in kept.items() if n.startswith(kind)} for kind in _KINDS}
        return cls(kept["clean"], parts["each."], parts["shared."], kept["seeds"], positions, settings)

    @classmethod
    def join(cls, parts: Sequence[Latents], settings: Mapping[str, Any]) -> Latents:
        """Of one drawing's shards. Raises InputError where they are of different sizes."""
        if len({part.clean.shape[1:] for part in parts}) > 1:
            raise InputError("drawings of different sizes in one folder: draw each size into a folder of its own")
        first = parts[0]
        each = {name: torch.cat([part.each[name] for part in parts]) for name in first.each}
        clean, seeds = torch.cat([part.clean for part in parts]), torch.cat([part.seeds for part in parts])
        return cls(clean, each, first.shared, seeds, first.positions, settings)


_KINDS = ("each.", "shared.")
