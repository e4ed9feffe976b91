"""Where the tokens of a vision tower stand: the rows and columns of its patches, read off the patch convolution."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from linearize.types import InputError


class Layout(NamedTuple):
    """prefix tokens (CLS, registers), then a grid of (rows, columns) row by row, then suffix tokens."""

    grid: tuple[int, ...]
    prefix: int
    suffix: int


class Grid:
    """A forward hook on a tower's patch convolution: the size of its output, of the forward that runs now.

    suffix: tokens that the tower puts behind its patches. moved: (which patches are left out, where each went), [B, T]
    both, in towers that mask some (None: every patch is at its place).
    """

    def __init__(self, suffix: int = 0) -> None:
        self.suffix = suffix
        self.size: tuple[int, ...] | None = None
        self.moved: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.size = tuple(output.shape[-2:])

    def masked(self, module: nn.Module, args: Any, output: Any) -> None:
        """The hook on embeddings that mask: they return (tokens, which patches are left out, where each went)."""
        self.moved = output[1:]

    def read(self, tokens: int, name: str, prefix: int | None = None) -> Layout:
        """Where `tokens` of this forward stand; prefix: as many tokens as must come before the patches (None: whatever
        is left over). Raises InputError naming the layer where they are not the patches of the image, in order."""
        if self.size is None:
            raise InputError(f"{name}: no image went through the patch convolution of its tower, so it has no grid")
        rows, columns = self.size
        found = tokens - rows * columns - self.suffix
        left_out = self.moved is not None and bool(self.moved[0].any())
        if found < 0 or left_out or found != (found if prefix is None else prefix):
            wanted = "" if prefix is None else f", {prefix} before them"
            raise InputError(
                f"{name}: {tokens} tokens for {rows} x {columns} patches{wanted}: patches are left out or merged, and "
                "this method needs all of them (mask_ratio: 0 where the model masks them)"
            )
        if self.moved is not None and bool((self.moved[1].diff(dim=1) < 0).any()):
            raise InputError(
                f"{name}: the model shuffles its patches, and this method needs them in order: pass a noise that rises "
                "along the patches"
            )
        return Layout((rows, columns), found, self.suffix)


def watch(model: nn.Module, name: str) -> Grid | None:
    """The grid of the tower around the module `name`: its nearest owner that has a patch convolution (one from the
    image's channels whose stride is its kernel). Hooked once for all layers of a tower. None where there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        tower = model.get_submodule(".".join(parts[:end]))
        channels = _channels(tower)
        for module in tower.modules() if channels else ():
            if isinstance(module, nn.Conv2d) and module.in_channels == channels and module.kernel_size == module.stride:
                return _hooked(tower, module)
    return None


def is_timm(tower: nn.Module) -> bool:
    """Whether this is a vision transformer of timm: these have no configuration, and say how many tokens come first."""
    return hasattr(tower, "num_prefix_tokens") and hasattr(tower, "patch_embed")


def _channels(tower: nn.Module) -> int | None:
    """Of the images that a tower takes; None where it says nothing of any."""
    if is_timm(tower):
        return getattr(getattr(tower.patch_embed, "proj", None), "in_channels", None)
    return getattr(getattr(tower, "config", None), "num_channels", None)


def forget(model: nn.Module, used: Collection[Grid]) -> None:
    """Take every hook out of `model` but those of the grids still `used`."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                grid = getattr(hook, "__self__", hook)
                if isinstance(grid, Grid) and not any(grid is g for g in used):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hooked(tower: nn.Module, convolution: nn.Module) -> Grid:
    for hook in convolution._forward_hooks.values():
        if isinstance(hook, Grid):
            return hook
    behind = [p.shape[1] for n, p in tower.named_parameters() if n.endswith("detection_tokens")]
    grid = Grid(sum(behind))
    convolution.register_forward_hook(grid)
    for embeddings in _masking(tower):
        embeddings.register_forward_hook(grid.masked)
    return grid


def _masking(tower: nn.Module) -> Iterator[nn.Module]:
    """Embeddings that keep a random part of the patches, in random order (MAE)."""
    return (m for m in tower.modules() if hasattr(m, "random_masking"))
