"""What one forward of a diffusion transformer takes, from its configuration: for probes, and for tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from linearize.seams.dit import family, grid_ids


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def _image(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    """Latents [B, C, rows, columns] and a time: what all of them take."""
    patch = module.config.patch_size or 1
    size = [n * patch for n in grid[-2:]]
    return {
        "hidden_states": _noise(batch, module.config.in_channels, *size),
        "timestep": torch.linspace(900, 100, batch),
    }


def _words(module: Any, batch: int, text: int, width: str) -> Tensor:
    return _noise(batch, text, getattr(module.config, width))


def _dit(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    made = _image(module, grid, batch, text)
    return {**made, "timestep": made["timestep"].long(), "class_labels": torch.arange(batch)}


def _pixart(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    more = {"resolution": None, "aspect_ratio": None}
    if module.use_additional_conditions:
        more = {"resolution": _noise(batch, 2).abs(), "aspect_ratio": _noise(batch, 1).abs()}
    words = _words(module, batch, text, "caption_channels")
    return {**_image(module, grid, batch, text), "encoder_hidden_states": words, "added_cond_kwargs": more}


def _sd3(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    return {
        **_image(module, grid, batch, text),
        "encoder_hidden_states": _words(module, batch, text, "joint_attention_dim"),
        "pooled_projections": _noise(batch, module.config.pooled_projection_dim),
    }


def _auraflow(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    made = _image(module, grid, batch, text)
    words = _words(module, batch, text, "joint_attention_dim")
    return {**made, "timestep": made["timestep"] / 1000, "encoder_hidden_states": words}


def _lumina2(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    lengths = text - torch.arange(batch) % 2  # captions of two lengths
    return {
        **_image(module, grid, batch, text),
        "encoder_hidden_states": _words(module, batch, text, "cap_feat_dim"),
        "encoder_attention_mask": torch.arange(text) < lengths[:, None],
    }


def _hunyuan(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    c = module.config
    return {
        **_image(module, grid, batch, text),
        "encoder_hidden_states": _noise(batch, c.text_len, c.cross_attention_dim),
        "text_embedding_mask": torch.ones(batch, c.text_len, dtype=torch.long),
        "encoder_hidden_states_t5": _noise(batch, c.text_len_t5, c.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.ones(batch, c.text_len_t5, dtype=torch.long),
        "image_meta_size": torch.full((batch, 6), 64.0),
        "style": torch.zeros(batch, dtype=torch.long),
    }


def _packed(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    """Flux and its kin: tokens with their ids."""
    rows, columns = grid[-2:]
    axes = len(module.config.axes_dims_rope)
    ids = torch.zeros(rows * columns, axes)
    ids[:, 1:3] = grid_ids(rows, columns, ids)
    made = {
        "hidden_states": _noise(batch, rows * columns, module.config.in_channels),
        "timestep": torch.linspace(0.9, 0.1, batch),
        "encoder_hidden_states": _words(module, batch, text, "joint_attention_dim"),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, axes),
    }
    if getattr(module.config, "guidance_embeds", False):
        made["guidance"] = torch.full((batch,), 3.5)
    return made


def _flux(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    pooled = _noise(batch, module.config.pooled_projection_dim)
    return {**_packed(module, grid, batch, text), "pooled_projections": pooled}


def _chroma(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    seen = torch.ones(batch, text + math.prod(grid[-2:]), dtype=torch.bool)
    seen[0, text - 1] = False
    return {**_packed(module, grid, batch, text), "attention_mask": seen}


def _qwen(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    seen = torch.ones(batch, text, dtype=torch.bool)
    seen[0, -1] = False
    return {
        "hidden_states": _noise(batch, math.prod(grid[-2:]), module.config.in_channels),
        "timestep": torch.linspace(0.9, 0.1, batch),
        "encoder_hidden_states": _words(module, batch, text, "joint_attention_dim"),
        "encoder_hidden_states_mask": seen,
        "img_shapes": [[(1, *grid[-2:])]] * batch,
    }


def _cogvideo(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    c, (frames, rows, columns) = module.config, _three(grid)
    size = (frames * (c.patch_size_t or 1), c.in_channels, rows * c.patch_size, columns * c.patch_size)
    words = _words(module, batch, text, "text_embed_dim")
    more = {"ofs": torch.ones(1)} if c.ofs_embed_dim else {}
    return {
        "hidden_states": _noise(batch, *size),
        "timestep": torch.linspace(900, 100, batch),
        "encoder_hidden_states": words,
        **more,
    }


def _wan(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    c = module.config
    size = [n * p for n, p in zip(_three(grid), c.patch_size)]
    made = {
        "hidden_states": _noise(batch, c.in_channels, *size),
        "timestep": torch.linspace(900, 100, batch),
        "encoder_hidden_states": _words(module, batch, text, "text_dim"),
    }
    if c.image_dim is not None:
        made["encoder_hidden_states_image"] = _noise(batch, 257, c.image_dim)
    return made


def _ltx(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    frames, rows, columns = _three(grid)
    return {
        "hidden_states": _noise(batch, frames * rows * columns, module.config.in_channels),
        "timestep": torch.linspace(900, 100, batch),
        "encoder_hidden_states": _words(module, batch, text, "caption_channels"),
        "encoder_attention_mask": torch.ones(batch, text),
        "num_frames": frames,
        "height": rows,
        "width": columns,
    }


def _zimage(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    c, (frames, rows, columns) = module.config, _three((1, *grid[-2:]))
    patch = c.all_patch_size[0]
    size = (c.in_channels, frames * c.all_f_patch_size[0], rows * patch, columns * patch)
    return {
        "x": list(_noise(batch, *size)),
        "t": torch.linspace(0.9, 0.1, batch),
        "cap_feats": list(_noise(batch, text, c.cap_feat_dim)),
    }


def _unet(module: Any, grid: tuple[int, ...], batch: int, text: int) -> dict[str, Any]:
    scale = 2 ** (len(module.config.block_out_channels) - 1)
    return {
        "sample": _noise(batch, module.config.in_channels, *(n * scale for n in grid[-2:])),
        "timestep": torch.linspace(900, 100, batch),
        "encoder_hidden_states": _words(module, batch, text, "cross_attention_dim"),
    }


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, rows, columns); an image is asked for as two frames of it, so that frames are seen."""
    frames, rows, columns = grid if len(grid) == 3 else (2, *grid)
    return frames, rows, columns


#: transformer class -> its inputs, by (module, grid, batch, text tokens)
_INPUTS = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "HunyuanDiT2DModel": _hunyuan,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _packed,
    "ChromaTransformer2DModel": _chroma,
    "AuraFlowTransformer2DModel": _auraflow,
    "QwenImageTransformer2DModel": _qwen,
    "CogVideoXTransformer3DModel": _cogvideo,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
    "Lumina2Transformer2DModel": _lumina2,
    "ZImageTransformer2DModel": _zimage,
    "UNet2DConditionModel": _unet,
}


def small_inputs(
    model: nn.Module,
    grid: tuple[int, ...] = (2, 2),
    batch: int = 1,
    text: int = 5,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> dict[str, Any] | None:
    """What one forward of a known transformer takes: noise of `grid` patches, `text` tokens. None for other models."""
    make = next((_INPUTS[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in _INPUTS), None)
    if make is None or family(model) is None:
        return None

    def cast(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: cast(v) for k, v in x.items()}
        if isinstance(x, list):
            return [cast(v) for v in x]
        if not isinstance(x, Tensor):
            return x
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    return cast(make(model, grid, batch, text))
