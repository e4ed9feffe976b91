"""Diffusion models as rows of data: where text stands among the tokens, where the grid comes from, what to leave alone.

Their attention calls `F.scaled_dot_product_attention` (see seams/sdpa.py) inside processors, which stay untouched. The
call knows no image size: a forward pre-hook on the transformer takes the grid of each forward from its inputs. Checked
with diffusers 0.42; nothing of it is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from linearize.seams.grid import Grid, Layout
from linearize.types import InputError, SiteShape, Unsupported


class Tokens(Grid):
    """A forward pre-hook on a transformer: the grid of the forward that runs now, and what stands around it.

    text: where text stands in joint attention. further: tokens of other images, behind both. starts: the column of
    each row's first image token, where rows differ (None: they do not).
    """

    def __init__(self, text: Literal["none", "first", "last"]) -> None:
        super().__init__()
        self.text = text
        self.further = 0
        self.starts: tuple[int, ...] | None = None

    @torch.compiler.disable  # ids are values: a compiled transformer is compiled again for another grid
    def take(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The hook itself."""
        row = family(module)
        assert row is not None and row.grid is not None
        named = {**dict(zip(_parameters(type(module)), args)), **kwargs}
        size, self.further = row.grid(module, named)
        self.size = size[1:] if len(size) == 3 and size[0] == 1 else size
        starts = row.starts(named) if row.starts else []
        self.starts = tuple(starts) if len(set(starts)) > 1 else None

    def read(self, tokens: int, name: str, prefix: int | None = None) -> Layout:
        """Where `tokens` of this forward stand; text may be of any length. Raises InputError naming the layer."""
        if self.size is None:
            raise InputError(f"{name} ran outside of its transformer's forward, so nobody said where its image is")
        rest = tokens - math.prod(self.size) - self.further
        if rest < 0 or (rest and self.text == "none"):
            size = " x ".join(map(str, self.size))
            raise InputError(f"{name}: {tokens} tokens are not an image of {size}: no two-dimensional mixer fits them")
        if self.text == "first":
            return Layout(self.size, rest, self.further)
        return Layout(self.size, 0, rest + self.further)

    def order(self, tokens: int, device: torch.device) -> Tensor:
        """Columns [B, tokens] of each row's image, then of all that is no image."""
        assert self.size is not None and self.starts is not None
        column_T = torch.arange(tokens, device=device)
        start_B1 = torch.tensor(self.starts, device=device)[:, None]
        rest_BT = (column_T < start_B1) | (column_T >= start_B1 + math.prod(self.size))
        return rest_BT.long().argsort(dim=1, stable=True)


@dataclass(frozen=True)
class Family:
    """One transformer class. text: where it stands in joint attention. grid(module, inputs): the grid, and how many
    tokens of further images there are. starts(inputs): the first image column of each row. alone: pattern of
    sites that see the image only. skip: (pattern of a site, why it is left alone). linear: why there is nothing to
    replace. time: a forward is told the scheduler's timestep times this (None: otherwise, see the family's pipeline).
    """

    text: Literal["none", "first", "last"] = "none"
    grid: Callable[[Any, dict[str, Any]], tuple[tuple[int, ...], int]] | None = None
    starts: Callable[[dict[str, Any]], list[int]] | None = None
    alone: str = ""
    skip: tuple[tuple[str, str], ...] = ()
    linear: str = ""
    time: float | None = None


# ------------------------------------------------------------------------------------------------- sources of the grid
def _latent(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """[B, C, rows, columns] over the patch size."""
    patch = module.config.patch_size or 1
    return tuple(n // patch for n in inputs["hidden_states"].shape[-2:]), 0


def _frames_first(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """CogVideoX: [B, frames, C, rows, columns]."""
    frames, _, rows, columns = inputs["hidden_states"].shape[1:]
    patch = module.config.patch_size
    return (frames // (module.config.patch_size_t or 1), rows // patch, columns // patch), 0


def _frames_last(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Wan: [B, C, frames, rows, columns]."""
    return tuple(n // p for n, p in zip(inputs["hidden_states"].shape[2:], module.config.patch_size)), 0


def _said(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """LTX: numbers beside the packed tokens."""
    time, patch = module.config.patch_size_t, module.config.patch_size
    return (inputs["num_frames"] // time, inputs["height"] // patch, inputs["width"] // patch), 0


def _listed(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Z-Image: a list of [C, frames, rows, columns], one size for all."""
    images = inputs["x"]
    if isinstance(images[0], list):
        raise Unsupported("Z-Image with reference images (omni mode) is not supported: its tokens are ragged")
    if len({tuple(x.shape) for x in images}) > 1:
        raise Unsupported("images of different sizes in one batch: run them one by one")
    frames, rows, columns = images[0].shape[1:]
    patch, time = inputs.get("patch_size") or 2, inputs.get("f_patch_size") or 1
    return (frames // time, rows // patch, columns // patch), 0


def _shapes(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """QwenImage: sizes of all images of a row, the one that is made first."""
    rows = [row if isinstance(row, list) else [row] for row in inputs["img_shapes"]]
    if any(row != rows[0] for row in rows):
        raise Unsupported("images of different sizes in one batch: run them one by one")
    first, *more = (tuple(int(n) for n in size) for size in rows[0])
    return first, sum(map(math.prod, more))


def _ids(module: Any, inputs: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """Flux and its kin: (image, row, column, ...) of every token; further images have another first number."""
    ids = inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    own = int((ids[:, 0] == ids[0, 0]).sum())
    rows, columns = (int(n) + 1 for n in ids[:own, 1:3].amax(0))
    if rows * columns != own or not torch.equal(ids[:own, 1:3], grid_ids(rows, columns, ids)):
        raise Unsupported("img_ids do not number one image row by row: no two-dimensional mixer fits them")
    return (rows, columns), len(ids) - own


def grid_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """(row, column) of every token [rows * columns, 2]."""
    y, x = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (rows, columns))
    return torch.stack([y[:, None].expand(rows, columns), x.expand(rows, columns)], -1).flatten(0, 1)


_CROSS = (r"\battn2$", "cross-attention: its keys are the text's")
_CAPTION = (r"context_refiner\.", "sees the caption only")

#: transformer class -> what is not the same for all. A new family is one row (and one in testing/pico.py).
FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(grid=_latent, time=1.0),
    "PixArtTransformer2DModel": Family(grid=_latent, skip=(_CROSS,), time=1.0),
    "HunyuanDiT2DModel": Family(grid=_latent, skip=(_CROSS,)),
    "SD3Transformer2DModel": Family("last", grid=_latent, alone=r"\battn2$", time=1.0),
    "FluxTransformer2DModel": Family("first", grid=_ids, time=1e-3),
    "Flux2Transformer2DModel": Family("first", grid=_ids),
    "ChromaTransformer2DModel": Family("first", grid=_ids, time=1e-3),
    "AuraFlowTransformer2DModel": Family("first", grid=_latent),
    "QwenImageTransformer2DModel": Family("first", grid=_shapes, time=1e-3),
    "CogVideoXTransformer3DModel": Family("first", grid=_frames_first),
    "WanTransformer3DModel": Family(grid=_frames_last, skip=(_CROSS,)),
    "LTXVideoTransformer3DModel": Family(grid=_said, skip=(_CROSS,)),
    "Lumina2Transformer2DModel": Family(
        "first",
        grid=_latent,
        starts=lambda inputs: inputs["encoder_attention_mask"].sum(1).tolist(),
        alone=r"noise_refiner\.",
        skip=(_CAPTION,),
    ),
    "ZImageTransformer2DModel": Family("last", grid=_listed, alone=r"noise_refiner\.", skip=(_CAPTION,)),
    # Each of these inside a UNet has a resolution of its own.
    "Transformer2DModel": Family(grid=_latent, skip=(_CROSS,)),
    "UNet2DConditionModel": Family(skip=((r"", "not inside a Transformer2DModel: its grid is unknown"),)),
    "SanaTransformer2DModel": Family(linear="SanaTransformer2DModel is linear already (ReLU linear attention)"),
}


# ------------------------------------------------------------------------------------------------------------- finding
def family(module: nn.Module) -> Family | None:
    """The row of a transformer, by the name of its class or of one that it is made from."""
    found = (FAMILIES.get(cls.__name__) for cls in type(module).__mro__ if cls.__module__.startswith("diffusers."))
    return next((row for row in found if row is not None), None)


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, name of the transformer around it) of every attention of diffusers' making."""
    for name, module in model.named_modules():
        if hasattr(module, "set_processor") and hasattr(module, "processor"):
            parts = name.split(".")
            around = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
            owner = next((o for o in around if family(model.get_submodule(o)) is not None), None)
            if owner is not None:
                yield name, module, owner


def unknown(model: nn.Module) -> str | None:
    """The class of a model of diffusers' making whose attention belongs to no family."""
    own = any(cls.__module__.startswith("diffusers.") for cls in type(model).__mro__)
    return type(model).__name__ if own and any(hasattr(m, "set_processor") for m in model.modules()) else None


def left_alone(row: Family, name: str, module: nn.Module) -> str | None:
    """Why an attention inside a transformer of this family is not replaced; None where it can be."""
    for pattern, why in row.skip:
        if re.search(pattern, name):
            return why
    return "cross-attention: its keys are the text's" if getattr(module, "is_cross_attention", False) else None


def shape(row: Family, name: str, module: Any) -> SiteShape:
    """Sizes of one attention. Processors repeat grouped keys themselves, so that all heads arrive."""
    heads = module.heads
    dim = getattr(module, "head_dim", None) or module.inner_dim // heads
    joint = row.text != "none" and not (row.alone and re.search(row.alone, name))
    return SiteShape(
        heads=heads,
        kv_heads=heads,
        key_dim=dim,
        value_dim=dim,
        width=getattr(module, "query_dim", module.inner_dim),
        scale=dim**-0.5,
        causal=False,
        image=True,
        joint=joint,
    )


def refusal(name: str, module: Any) -> str | None:
    """What is in the way of surgery on an attention."""
    if getattr(module, "fused_projections", False):
        return (
            f"{name}: its projections are fused, which drops a LoRA silently and swaps processors: call "
            "unfuse_qkv_projections() first"
        )
    return None


# -------------------------------------------------------------------------------------------------------- at each call
def _parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    forward: Any = cls.forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward.__code__.co_varnames[1 : forward.__code__.co_argcount]


def watch(owner: nn.Module) -> Tokens:
    """The grid of a transformer, hooked once for all of its layers."""
    for hook in owner._forward_pre_hooks.values():
        if isinstance(tokens := getattr(hook, "__self__", None), Tokens):
            return tokens
    row = family(owner)
    assert row is not None
    tokens = Tokens(row.text)
    owner.register_forward_pre_hook(tokens.take, with_kwargs=True)
    return tokens


def read_mask(name: str, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """valid_BT of a mask over joint attention: [B, H or 1, 1 or T, T], bool or added to the scores.

    Raises InputError where it says more than which tokens are padding.
    """
    if mask is None:
        return None
    mask = mask if mask.ndim == 4 else mask.reshape(-1, 1, *mask.shape[-2:])
    seen = mask if mask.dtype == torch.bool else mask > -5000  # diffusers adds -10000
    valid = seen[:, :, 0] if mask.shape[2] == 1 else seen.diagonal(dim1=2, dim2=3)
    if not torch.compiler.is_compiling():
        pairs = valid[:, :, None] if mask.shape[2] == 1 else valid[:, :, None] & valid[..., None]
        added = mask.dtype != torch.bool and bool((seen & (mask != 0)).any())
        if added or not torch.equal(seen, pairs) or not torch.equal(valid, valid[:, :1].expand_as(valid)):
            raise InputError(f"{name}: this attention mask says more than what is padding; no mixer can keep it")
    return valid[:, 0].expand(batch, tokens)
