"""Vision transformers: images, classes and features, where each patch looks."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.data.examples import Examples
from linearize.data.images import Images, Processing, Tower, interpolates, read_images
from linearize.data.labels import has_head
from linearize.data.painter import Painter
from linearize.evaluate.diagnostics import dense_maps
from linearize.evaluate.quality import WINDOW
from linearize.mixers import base as mixers
from linearize.report import looks, schema
from linearize.stages.targets import outputs
from linearize.storage import write_atomic
from linearize.surgery.attach import Surgery
from linearize.tasks.base import HELD_OUT, Exam, Pool, Say, Task, Teacher, called, diagnosed
from linearize.tasks.encoder import Compared
from linearize.types import InputError

DIAGNOSED = 4  # images whose attention maps are looked into
LONGEST = 1100  # tokens: maps are T x T
SAMPLES = 6
DRAWN = "images drawn like those that the embedded teacher was trained on (real ones: --dataset)"


class Pictures(Compared[Images]):
    """Images that teacher and student look at."""

    unit = "images"

    def few(self, most: int) -> Pictures:
        return Pictures(self.data.take(0, most), self.plan, self.pool)

    def write(self, folder: Path) -> None:
        from safetensors.torch import save

        tensors = {"pixels": self.data.pixels[self.data.order]}
        if self.data.labels is not None:
            tensors["labels"] = self.data.labels[self.data.order]
        write_atomic(folder / HELD_OUT, save(tensors))


class Image(Task):
    """Encoders of images, with or without a classifier."""

    name = "image"

    @property
    def config(self) -> Any:
        return self.model.config

    def read(self, given: Any, work: Path | None, say: Say) -> Images:
        data = self.plan.data
        source = data.source if given is None else given
        if getattr(self.config, "mask_ratio", 0):
            raise InputError(
                f"config.mask_ratio: {self.config.mask_ratio} of the patches are hidden at random, so that no two "
                "forwards can be compared: load the model with mask_ratio 0"
            )
        if isinstance(source, Images):
            found = source
        elif isinstance(source, Examples):
            raise InputError(f"{type(source).__name__} are no images, which this model looks at: give images")
        elif source in (None, "self"):
            found = self._drawn()
        elif not isinstance(source, str | Path):
            raise InputError("images come from files, a folder or a hub data set, or as linearize.data.images.Images")
        else:
            found = self._images(source, data.split)
        found.check(self.config)
        return found

    def _drawn(self) -> Images:
        """As many images as `data.self_tokens` has room for, of the painter beside the model."""
        painter, tower = Painter.beside(self.folder), Tower.of(self.config)
        if painter is None:
            raise InputError("data.source: name images to train on (--dataset); they need no labels")
        length = math.prod(tower.grid(painter.size[1:])) + tower.prefix
        pixels = painter.draw(max(self.plan.data.self_tokens // length, 1), self.plan.seed)
        return Images(pixels, None, Processing.of(tower.channels, self.processor), tower, notes=(DRAWN,))

    def _images(self, source: str | Path, split: str | None, limit: int | None = None) -> Images:
        data = self.plan.data
        return read_images(
            source, self.config, processor=self.processor, split=split, image_column=data.image_column,
            label_column=data.label_column, limit=limit, skip_bad=data.skip_bad,
        )  # fmt: skip

    def exam(self, valid: Examples | None) -> Pictures:
        plan = self.plan
        if valid is not None:
            assert isinstance(valid, Images)
            return self._pictures(valid.take(0, plan.eval.limit))
        source = plan.eval.source or plan.data.valid
        assert source is not None
        return self._pictures(self._images(source, plan.eval.split, plan.eval.limit))

    def kept(self, folder: Path) -> Pictures | None:
        from safetensors.torch import load

        if not (folder / HELD_OUT).is_file():
            return None
        kept = load((folder / HELD_OUT).read_bytes())
        tower = Tower.of(self.config)
        pixels = kept["pixels"]
        size = (pixels.shape[2], pixels.shape[3])
        images = Images(
            pixels, kept.get("labels"), Processing.of(tower.channels, self.processor), tower,
            interpolate=bool(interpolates(self.config, size)),
        )  # fmt: skip
        return self._pictures(images.take(0, self.plan.eval.limit))

    def _pictures(self, images: Images) -> Pictures:
        plan = self.plan
        given = DRAWN if DRAWN in images.notes else called(plan.data.source, "the images given")
        own = f"held-out part of {given}"
        name = called(plan.eval.source or plan.data.valid, own)
        rows, columns = images.size
        words = f"{name}: {len(images)} images of {rows} x {columns} pixels"
        return Pictures(images, plan, self.pool, words)

    @property
    def pool(self) -> Pool:
        """The first token before the patches (CLS); the mean of all where there is none."""
        prefix = Tower.of(self.config).prefix
        return lambda hidden_BTD, real_BT: hidden_BTD[:, 0] if prefix else hidden_BTD.mean(1)

    @property
    def zero(self) -> list[tuple[str, str, dict[str, Any]]]:
        """A circle around each patch instead of a window along the tokens, and no attention at all."""
        none = [("none", "none", {})]
        return [(WINDOW, "clear", {"radius": self.plan.eval.window}), *none] if "clear" in mixers.names() else none

    # ------------------------------------------------------------------------------------------------ reports
    def samples(self, surgery: Surgery, exam: Exam, teacher: Teacher) -> tuple[list[schema.Sample], None]:
        assert isinstance(exam, Pictures)
        if not has_head(self.config):
            return [], None
        data = exam.data.take(0, SAMPLES)
        batch = data.collate([data[i] for i in range(len(data))])
        with torch.no_grad():
            _, student = outputs(surgery.model, batch, classify=True)
            with teacher() as other:
                _, known = outputs(other if isinstance(other, torch.nn.Module) else surgery.model, batch, classify=True)
        assert student is not None and known is not None
        said = []
        for i in range(len(data)):
            label = "" if data.labels is None else f"labelled {self._class(int(batch['labels'][i]))}"
            said.append(
                schema.Sample(
                    prompt=label, teacher=self._guesses(known[i]), student=self._guesses(student[i]),
                    image=png(data.picture(i)),
                )
            )  # fmt: skip
        return said, None

    def _class(self, number: int) -> str:
        return str(self.config.id2label.get(number, number))

    def _guesses(self, logits_C: Tensor) -> str:
        top = logits_C.float().softmax(-1).topk(min(3, len(logits_C)))
        return "\n".join(f"{self._class(int(c))} {100 * float(p):.1f} %" for p, c in zip(top.values, top.indices))

    def diagnostics(self, surgery: Surgery, exam: Exam) -> looks.Diagnostics:
        assert isinstance(exam, Pictures)
        data = exam.data.take(0, DIAGNOSED)
        if data.length > LONGEST:
            return looks.Diagnostics()
        found = diagnosed(surgery, [_without_labels(data, i) for i in range(len(data))])
        if not found.layers:
            return found
        rows, columns = data.grid
        places: Sequence[int | None] = [
            *([None] if data.prefix else []), rows // 2 * columns + columns // 2, rows // 4 * columns + columns // 4,
        ]  # fmt: skip
        for (layer, head), maps in dense_maps(surgery, _without_labels(data, 0)).items():
            patches = slice(data.prefix, data.prefix + rows * columns)
            for place in places:
                row = 0 if place is None else data.prefix + place
                weights = [maps[side][row, patches] for side in ("teacher", "student")]
                found.gazes.append(looks.Gaze.pack(layer, head, (rows, columns), place, *weights))
        found.image = png(data.picture(0))
        return found


def _without_labels(data: Images, index: int) -> dict[str, Tensor]:
    return {k: v for k, v in data.collate([data[index]]).items() if k != "labels"}


def png(pixels_CHW: Tensor) -> str:
    """Base64 of an image, uint8 with one channel or three (others show the first)."""
    from PIL import Image as Pillow

    channels = pixels_CHW if pixels_CHW.shape[0] == 3 else pixels_CHW[:1]
    array = channels.permute(1, 2, 0).numpy()
    out = io.BytesIO()
    Pillow.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()
