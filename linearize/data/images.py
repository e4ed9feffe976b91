"""Images as a model takes them: whole in memory as uint8 after resizing, float32 on access."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearize.data.examples import Examples
from linearize.data.labels import NO_LABELS, check_labels, label_numbers
from linearize.data.pictures import Unreadable, find_pictures
from linearize.data.reading import first_line
from linearize.types import InputError, Unsupported

#: tokens before the patches where it is not one (CLS) and the registers
_PREFIX = {"deit": 2, "siglip_vision_model": 0, "siglip": 0, "ijepa": 0, "swin": 0}
#: model types that interpolate their position embeddings (or have none) without being asked
_ANY_SIZE = {"dinov2", "dinov2_with_registers", "dinov3_vit"}


# -------------------------------------------------------------------------------------------------- the model's side
@dataclass(frozen=True)
class Tower:
    """What a vision model says of its input. image: (rows, columns) it was trained on (None: any); prefix: tokens
    before the patches."""

    channels: int
    patch: tuple[int, int]
    image: tuple[int, int] | None
    prefix: int

    @classmethod
    def of(cls, config: Any) -> Tower:
        """From a configuration, or the vision part of one. Raises InputError where the model takes no images."""
        config = getattr(config, "vision_config", None) or config
        patch = _pair(getattr(config, "patch_size", None))
        if patch is None or not getattr(config, "num_channels", None):
            raise InputError(f"a {config.model_type} model takes no images: name a vision transformer, or give text")
        prefix = _PREFIX.get(_family(config).model_type, 1) + (getattr(config, "num_register_tokens", 0) or 0)
        return cls(config.num_channels, patch, _pair(getattr(config, "image_size", None)), prefix)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches of an image of `size`."""
        return size[0] // self.patch[0], size[1] // self.patch[1]


def _family(config: Any) -> Any:
    """transformers' own class of a configuration: that of a converted model is derived from it."""
    return next(kind for kind in type(config).__mro__ if kind.__module__.startswith("transformers."))


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, dict):
        value = (value["height"], value["width"])
    return (value, value) if isinstance(value, int) else None if value is None else (int(value[0]), int(value[1]))


def image_processor(folder: str | Path, **options: Any) -> Any:
    """transformers' image processor of a model (the one on Pillow: torchvision is not needed); None where the folder
    has none. options: those of `from_pretrained`. Raises InputError where its file is broken."""
    from transformers import AutoImageProcessor

    here = Path(folder)
    if here.is_dir() and not any(
        (here / f"{name}.json").is_file() for name in ("preprocessor_config", "processor_config")
    ):
        return None
    try:
        return AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: its image processor cannot be loaded ({first_line(error)})") from None


@dataclass(frozen=True)
class Processing:
    """From an image to a model's input: `processor` (None: nothing) resizes and crops, then
    (x * rescale - mean_C) / std_C."""

    processor: Any
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, channels: int, processor: Any = None) -> Processing:
        """What the processor says; without one pixels are scaled to -1 .. 1."""
        if processor is None:
            return cls(None, 1 / 255, (0.5,) * channels, (0.5,) * channels)
        mean, std = (0.0,) * channels, (1.0,) * channels
        if processor.do_normalize:
            mean, std = (_values(getattr(processor, name), channels) for name in ("image_mean", "image_std"))
        return cls(processor, float(processor.rescale_factor) if processor.do_rescale else 1.0, mean, std)

    def sized(self, image: Any) -> Tensor:
        """A Pillow image or uint8 array [H, W] or [H, W, C], resized and cropped: uint8 [C, H, W]."""
        if self.processor is None:
            pixels = np.array(image)
            pixels = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        else:
            pixels = self.processor(_picture(image), do_rescale=False, do_normalize=False, return_tensors="np")
            pixels = pixels["pixel_values"][0]
        return torch.from_numpy(np.ascontiguousarray(pixels))

    def scaled(self, pixels_CHW: Tensor) -> Tensor:
        """float32 from uint8."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (pixels_CHW.float() * self.rescale - mean) / std

    def check(self, image: Any) -> None:
        """Raises Unsupported where the processor does more than this knows of."""
        if self.processor is None:
            return
        wanted = torch.from_numpy(np.array(self.processor(_picture(image), return_tensors="np")["pixel_values"][0]))
        ours = self.scaled(self.sized(image))
        if wanted.shape != ours.shape or not torch.allclose(wanted.float(), ours, atol=1e-4):
            raise Unsupported(
                f"{type(self.processor).__name__} does more to an image than resizing, cropping, rescaling and "
                "normalising: prepare the images beforehand and remove preprocessor_config.json"
            )


def _values(value: Any, channels: int) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),) * channels


def _picture(image: Any) -> Any:
    from PIL import Image

    if not isinstance(image, np.ndarray):
        return image
    return Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)


# ------------------------------------------------------------------------------------------------------ the examples
class Images(Examples):
    """Images of one size; item i is {"pixel_values": float32 [C, H, W], "labels": int64 [] where known}.

    Batches hold `interpolate_pos_encoding` too where the model must be told that they are not of its own size.
    notes: what a user may not have expected.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor | None,
        processing: Processing,
        tower: Tower,
        *,
        interpolate: bool = False,
        notes: Sequence[str] = (),
        order: Tensor | None = None,
    ) -> None:
        """pixels uint8 [N, C, H, W]; labels int64 [N] or None; order: which of them are in this view."""
        self.pixels, self.labels, self.processing, self.tower = pixels, labels, processing, tower
        self.interpolate, self.notes = interpolate, tuple(notes)
        self.order = torch.arange(len(pixels)) if order is None else order
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        item = {"pixel_values": self.processing.scaled(self.picture(index))}
        return item if self.labels is None else item | {"labels": self.labels[self.order[index]]}

    def picture(self, index: int) -> Tensor:
        """Image i before scaling: uint8 [C, H, W]."""
        return self.pixels[self.order[index]]

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of pixels."""
        return int(self.pixels.shape[-2]), int(self.pixels.shape[-1])

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.tower.grid(self.size)

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.tower.prefix

    @property
    def length(self) -> int:
        """Patches of one image and the tokens before them."""
        return self.grid[0] * self.grid[1] + self.prefix

    @property
    def tokens(self) -> int:
        return self.length * len(self)

    @property
    def digest(self) -> str:
        """sha256 over pixels, labels, and how they are scaled."""
        if self._digest is None:
            how = self.processing
            settings = [how.rescale, how.mean, how.std, self.interpolate, list(self.pixels.shape[1:])]
            total = hashlib.sha256(json.dumps(settings).encode())
            for rows in self.order.split(4096):
                total.update(memoryview(self.pixels[rows].numpy()).cast("B"))
                if self.labels is not None:
                    total.update(memoryview(self.labels[rows].numpy()).cast("B"))
            self._digest = total.hexdigest()
        return self._digest

    def take(self, start: int, stop: int | None = None) -> Images:
        """Images start..stop as a view."""
        stop = len(self) if stop is None else min(stop, len(self))
        if not 0 <= start < stop:
            raise InputError(f"no images between {start} and {stop}: the data has {len(self)}")
        return self._of(self.order[start:stop])

    def hold_out(self, tokens: int) -> tuple[Images, Images]:
        """(training, validation): images for `tokens` positions, evenly spaced: data often come by class."""
        count = -(-tokens // self.length)
        if count >= len(self):
            raise InputError(
                f"{len(self)} images of {self.length} tokens are too few to hold out {tokens}: give more images"
            )
        kept = torch.zeros(len(self), dtype=torch.bool)
        kept[(torch.arange(count) * len(self)) // max(count, 1)] = True
        return self._of(self.order[~kept]), self._of(self.order[kept])

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch: pixel_values [B, C, H, W], labels [B]."""
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return batch | {"interpolate_pos_encoding": torch.tensor(True)} if self.interpolate else batch

    def check(self, config: Any, *, allow_longer: bool = False) -> None:
        """Raises InputError where the model of `config` cannot take these images or labels."""
        tower = Tower.of(config)
        if (channels := self.pixels.shape[1]) != tower.channels:
            raise InputError(_channels("the images", channels, tower.channels))
        check_size(self.size, tower)
        asked = interpolates(config, self.size)
        if asked is None:
            raise InputError(
                f"images of {_by(self.size)} pixels: this model takes {_by(tower.image)} only; resize them, or put a "
                "preprocessor_config.json that does beside the model"
            )
        if asked != self.interpolate:
            raise InputError("these images were read for a model of another image size: read them with its config")
        check_labels(self.labels, config)

    def _of(self, order: Tensor) -> Images:
        return Images(
            self.pixels, self.labels, self.processing, self.tower,
            interpolate=self.interpolate, notes=self.notes, order=order,
        )  # fmt: skip


def read_images(
    source: str | Path,
    config: Any,
    *,
    processor: Any = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Images:
    """The images of `source` for a model of `config`: a folder of images (sub-folders are classes), a hub dataset or
    parquet file with a column of images, an IDX file (MNIST's form) or a folder of them, CIFAR's .bin, an .npz.

    processor: the model's (`image_processor`); without one images must be of one size already. split: the part of it,
    "train" where there are several; "[100:200]" and "train[:5%]" cut out. image_column, label_column: of a table or
    an .npz; label_column "none" leaves labels out. limit: stop after so many. skip_bad: leave out images that cannot
    be read (told in `notes`). Raises InputError, StorageError, Unsupported.
    """
    tower = Tower.of(config)
    processing = Processing.of(tower.channels, processor)
    pictures = find_pictures(source, split, image_column, label_column, limit)
    pixels: list[Tensor] = []
    labels: list[Any] = []
    bad: list[str] = []
    first, why = "", ""
    for name, load, label in islice(pictures.found, limit):
        try:
            image = load()
        except Unreadable as error:
            why = why or str(error)
            bad.append(name)
            continue
        if bad and not skip_bad:
            continue  # only to count the others
        if getattr(image, "mode", "L")[0] in "IF":
            raise InputError(f"{name}: pixels of mode {image.mode}, 8-bit ones are needed: convert the image")
        try:
            sized = processing.sized(image)
        except (ValueError, TypeError) as error:
            raise InputError(f"{name}: the model's image processor refuses it ({first_line(error)})") from None
        if sized.shape[0] != tower.channels:
            raise InputError(_channels(name, sized.shape[0], tower.channels))
        if not pixels:
            first = name
            check_size((sized.shape[1], sized.shape[2]), tower)
            processing.check(image)
        elif sized.shape != pixels[0].shape:
            raise InputError(
                f"images of mixed sizes, {_by(pixels[0].shape[1:])} ({first}) and {_by(sized.shape[1:])} ({name}): "
                "make them one size, or put a preprocessor_config.json that does (resize and crop) beside the model"
            )
        pixels.append(sized)
        labels.append(label)
    if bad and not skip_bad:
        raise InputError(f"{_unreadable(bad)} cannot be read ({why}): mend or remove them, or pass --skip-bad")
    if not pixels:
        raise InputError(f"{source}: no image in it{' that can be read' if bad else ''}; give at least one")
    notes = [f"{_unreadable(bad)} could not be read and {'was' if len(bad) == 1 else 'were'} left out"] if bad else []
    if processor is None:
        notes.append("the model has no image processor beside it: pixels are scaled to -1 .. 1, nothing is resized")
    numbers = None
    if label_column != NO_LABELS and any(label is not None for label in labels):
        numbers, more = label_numbers(labels, pictures.classes, config, source)
        notes += more
    size = (pixels[0].shape[1], pixels[0].shape[2])
    data = Images(
        torch.stack(pixels), numbers, processing, tower, interpolate=bool(interpolates(config, size)), notes=notes
    )
    data.check(config)
    return data


def check_size(size: tuple[int, int], tower: Tower) -> None:
    """Raises InputError where an image of `size` is not cut into at least two whole patches."""
    rows, columns = tower.grid(size)
    if rows * columns < 2:
        few = "one patch: attention has nothing to mix" if rows * columns else "no whole patch"
        raise InputError(f"images of {_by(size)} pixels hold {few}; patches are {_by(tower.patch)}: give larger images")
    left = size[0] % tower.patch[0] or size[1] % tower.patch[1]
    if left and size != tower.image:
        raise InputError(
            f"images of {_by(size)} pixels are no whole number of {_by(tower.patch)} patches: the model would drop the "
            "rest; resize or crop them"
        )


def interpolates(config: Any, size: tuple[int, int]) -> bool | None:
    """Whether a model of `config` must be told to interpolate its position embeddings for images of `size`; None where
    it cannot take that size."""
    from transformers import MODEL_MAPPING

    inner = getattr(config, "vision_config", None) or config
    if Tower.of(inner).image in (None, size) or _family(inner).model_type in _ANY_SIZE:
        return False
    model: Any = MODEL_MAPPING.get(_family(inner), None)
    taken = model is not None and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return taken or None


def _by(size: Any) -> str:
    return " x ".join(map(str, size))


def _channels(name: str, found: int, wanted: int) -> str:
    fix = "; set do_convert_rgb: true in preprocessor_config.json, or convert them" if wanted == 3 else "; convert them"
    return f"{name}: {found} channel{'s' * (found > 1)} where the model takes {wanted}{fix}"


def _unreadable(names: Sequence[str]) -> str:
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} image{'s' * (len(names) > 1)} ({some})"
