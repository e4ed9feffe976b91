"""Attention maps of one example on disk: every number as safetensors, a picture for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from linearize.report.plots import colormap, paint
from linearize.storage import write_atomic


def write(maps: Mapping[tuple[int, int], Mapping[str, Tensor]], folder: Path) -> list[str]:
    """Into `folder`, from (layer, head) -> name -> weights [T, any]: `maps.safetensors` with "layer.0.head.0.teacher"
    and so on, and `layer-00.png`, heads side by side, the square root of each weight over its map's largest. Returns
    the files' names. Raises StorageError."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"layer.{l}.head.{h}.{name}": x for (l, h), sides in maps.items() for name, x in sides.items()}
    files = {"maps.safetensors": save({name: x.contiguous() for name, x in named.items()})}
    for layer in sorted({layer for layer, _ in maps}):
        files[f"layer-{layer:02}.png"] = _picture([(h, sides) for (l, h), sides in maps.items() if l == layer])
    for name, content in files.items():
        write_atomic(folder / name, content)
    return list(files)


def _picture(heads: list[tuple[int, Mapping[str, Tensor]]]) -> bytes:
    names = list(heads[0][1])

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(names), len(heads), squeeze=False)
        for column, (head, sides) in enumerate(heads):
            for line, name in enumerate(names):
                ax, weights = axes[line, column], np.sqrt(sides[name].clamp(min=0).numpy())
                ax.imshow(weights, cmap=colormap(), vmin=0, aspect="auto", interpolation="nearest")
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
                if line == 0:
                    ax.set_title(f"head {head}", loc="center", fontsize=9)
                if column == 0:
                    ax.set_ylabel(name)

    return paint(draw, 2.2 * len(names), 2.2 * len(heads))
