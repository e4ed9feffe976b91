"""Where images lie: folders, tables with a column of images, IDX, CIFAR's .bin, .npz. Found here, decoded later."""

from __future__ import annotations

import gzip
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from linearize.data.labels import NO_LABELS
from linearize.data.reading import first_line, hub_rows, located, parquet_rows, split_of, unreadable
from linearize.types import InputError, nearest

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_IDX = re.compile(r"(?P<head>.*)images[-.]idx3[-.]ubyte(?P<gz>\.gz)?")
_KNOWN = _PICTURES | {".npz", ".bin", ".parquet", ".gz"}
#: other words for a split in file names
_SPLITS = {"train": {"train", "data"}, "test": {"test", "t10k"}, "valid": {"valid", "val", "validation"}}
_SPLITS |= {name: names for names in _SPLITS.values() for name in names if name not in _SPLITS}

#: (name, what reads it, label or None): reading raises Unreadable
Picture = tuple[str, Callable[[], Any], Any]


class Unreadable(Exception):
    """An image that cannot be decoded, with the reason."""


@dataclass(frozen=True)
class Pictures:
    """found: one by one, in an order in which classes mix. classes: what numbers in labels stand for, if known."""

    found: Iterable[Picture]
    classes: list[str] | None = None


def find_pictures(
    source: str | Path, split: str | None, image_column: str | None, label_column: str | None, limit: int | None
) -> Pictures:
    """The images of a source as `images.read_images` takes it. Raises InputError, StorageError."""
    path = located(source, _KNOWN)
    if path is None:
        return _hub(str(source), split, image_column, label_column, limit)
    part, cut = split_of(split)
    try:
        pictures = _local(path, part, image_column, label_column)
    except OSError as error:
        raise unreadable(path, error) from None
    return Pictures(cut(list(pictures.found)), pictures.classes) if split and "[" in split else pictures


def _local(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Pictures:
    if path.is_dir():
        sub = _sub_folder(path, split)
        if sub is not None:
            path, split = sub, None
        idx = [f for f in sorted(path.iterdir()) if _IDX.fullmatch(f.name)]
        for files in (idx, sorted(path.glob("*.bin")), sorted(path.rglob("*.parquet"))):
            if files:
                return _files(_of_split(files, split, path), image_column, label_column)
        return _folder(path, split)
    if _IDX.fullmatch(path.name) or path.suffix.lower() in (".bin", ".parquet"):
        return _files([path], image_column, label_column)
    if path.suffix.lower() == ".npz":
        return _npz(path, split, image_column, label_column)
    raise InputError(
        f"{path}: not a source of images; give a folder of images, a .parquet, .npz or CIFAR .bin file, or an IDX file "
        "(...images-idx3-ubyte)"
    )


def _sub_folder(path: Path, split: str | None) -> Path | None:
    """The folder of a split where `path` has one for each."""
    names = {f.name.lower(): f for f in path.iterdir() if f.is_dir()}
    wanted = [names[name] for name in sorted(_SPLITS.get(split or "train", {split or "train"})) if name in names]
    if split is None and not names.keys() <= set(_SPLITS):
        return None  # "train" is a class among others
    if names and not wanted and split is None:
        raise InputError(f"{path}: no sub-folder of split 'train'; it has {', '.join(names)}: name one with data.split")
    return wanted[0] if wanted else None


def _of_split(files: list[Path], split: str | None, path: Path) -> list[Path]:
    def are(names: Iterable[str]) -> list[Path]:
        return [f for f in files if set(names) & set(re.split(r"[\W_]+", f.name.lower()))]

    chosen = are(_SPLITS.get(split or "train", {split or "train"}))
    if chosen or (split is None and not any(are(names) for names in _SPLITS.values())):
        return chosen or files
    raise InputError(f"{path}: no file of split {split or 'train'!r}; it has {', '.join(f.name for f in files[:5])}")


def _files(files: list[Path], image_column: str | None, label_column: str | None) -> Pictures:
    if files[0].suffix.lower() == ".parquet":
        return _parquet(files, image_column, label_column)
    read = _idx if _IDX.fullmatch(files[0].name) else _cifar
    arrays = [(f, *read(f, label_column)) for f in files]
    return Pictures(chain.from_iterable(_rows(*part) for part in arrays))


def _rows(path: Path, images: np.ndarray, labels: np.ndarray | None) -> Iterator[Picture]:
    for number, image in enumerate(images):
        yield f"{path.name} [{number}]", lambda image=image: image, None if labels is None else int(labels[number])


# --------------------------------------------------------------------------------------------------------- folders
def _folder(path: Path, split: str | None) -> Pictures:
    if split not in (None, "train", "all"):
        raise InputError(f"{path}: no sub-folder for split {split!r}; make one, or cut images out with '[100:200]'")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in _PICTURES and f.name[0] != "." and f.is_file())
    if not files:
        raise InputError(f"{path}: no image in this folder; known are {', '.join(sorted(_PICTURES))}")
    classes: dict[str | None, list[Path]] = {}
    for file in files:
        inside = file.relative_to(path).parts
        classes.setdefault(inside[0] if len(inside) > 1 else None, []).append(file)
    if None in classes and len(classes) > 1:
        raise InputError(
            f"{path}: images beside class folders ({classes[None][0].name}): put all of them into folders, or none"
        )
    turns = zip_longest(*([(f, name) for f in some] for name, some in classes.items()))
    found = (pair for turn in turns for pair in turn if pair is not None)
    return Pictures((str(f.relative_to(path)), lambda f=f: decode(f), name) for f, name in found)


def decode(file: Path | bytes) -> Any:
    """The Pillow image of a file or of its bytes, upright; palettes become RGB. Raises Unreadable."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
        image = ImageOps.exif_transpose(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise Unreadable(
            first_line(error).replace(str(file), "it") if isinstance(file, Path) else first_line(error)
        ) from None
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert("L") if image.mode == "1" else image


# ---------------------------------------------------------------------------------------------------------- arrays
def _idx(path: Path, label_column: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """IDX: two zero bytes, the type (8: uint8), the number of axes, their sizes as big-endian int32, the values."""
    images = _idx_array(path, 3)
    named = _IDX.fullmatch(path.name)
    beside = path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1").removesuffix(".gz")
    files = [f for f in (path.with_name(beside), path.with_name(beside + ".gz")) if f.is_file()]
    if label_column == NO_LABELS or named is None or not files:
        return images, None
    labels = _idx_array(files[0], 1)
    if len(labels) != len(images):
        raise InputError(f"{files[0]}: {len(labels)} labels for {len(images)} images of {path.name}: not of one set")
    return images, labels


def _idx_array(path: Path, axes: int) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a readable gzip file ({first_line(error)}); download it again") from None
    start = 4 + 4 * axes
    if data[:4] != bytes([0, 0, 8, axes]) or len(data) < start:
        raise InputError(f"{path}: not an IDX file of bytes with {axes} axes; download it again")
    shape = struct.unpack(f">{axes}I", data[4:start])
    if len(data) - start != np.prod(shape, dtype=np.int64):
        raise InputError(f"{path}: {len(data) - start:,} bytes for {' x '.join(map(str, shape))}; download it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _cifar(path: Path, label_column: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """CIFAR-10: a label and 3 x 32 x 32 bytes each; CIFAR-100: a coarse and a fine label before them."""
    data = np.frombuffer(path.read_bytes(), np.uint8)
    labels = next((n for n in (1, 2) if len(data) and len(data) % (3072 + n) == 0), None)
    if labels is None:
        raise InputError(
            f"{path}: {len(data):,} bytes are no CIFAR file (records of 3,073 or 3,074): download it again"
        )
    rows = data.reshape(-1, 3072 + labels)
    images = np.moveaxis(rows[:, labels:].reshape(-1, 3, 32, 32), 1, -1)
    column = {None: labels - 1, "fine": labels - 1, "coarse": 0, NO_LABELS: -1}.get(label_column)
    if column is None:
        raise InputError(
            f"{path}: no labels {label_column!r} in CIFAR; {nearest(str(label_column), ['fine', 'coarse'])}"
        )
    return images, None if column < 0 else rows[:, column]


def _npz(path: Path, split: str | None, image_column: str | None, label_column: str | None) -> Pictures:
    """Arrays of uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W], and of whole-number labels [N] or [N, 1]."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError, KeyError, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz of plain arrays ({first_line(error)})") from None
    parts = {name: set(re.split(r"[\W_]+", name.lower())) for name in arrays}
    if any(parts[name] & {*_SPLITS["train"], *_SPLITS["test"], *_SPLITS["valid"]} - {"data"} for name in arrays):
        wanted = _SPLITS.get(split or "train", {split})
        arrays = {name: a for name, a in arrays.items() if parts[name] & wanted or name in (image_column, label_column)}
    elif split not in (None, "train", "all"):
        raise InputError(f"{path}: no arrays of split {split!r}; it has {', '.join(arrays)}")
    images = _array(path, arrays, image_column, "image", lambda a: a.ndim in (3, 4))
    if images is None:
        raise InputError(f"{path}: no array of images [N, H, W] or [N, H, W, C] in it; it has {', '.join(parts)}")
    if images.dtype != np.uint8:
        raise InputError(f"{path}: images of {images.dtype}, uint8 from 0 to 255 is needed: convert them")
    if images.ndim == 4 and images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = np.moveaxis(images, 1, -1)
    labels = None
    if label_column != NO_LABELS:
        count = len(images)
        labels = _array(path, arrays, label_column, "label", lambda a: a.size == count and a.dtype.kind in "iu")
    return Pictures(_rows(path, images, None if labels is None else labels.reshape(-1)))


def _array(
    path: Path, arrays: dict[str, np.ndarray], wanted: str | None, kind: str, fits: Callable[[np.ndarray], bool]
) -> np.ndarray | None:
    if wanted is not None and wanted not in arrays:
        raise InputError(f"{path}: no array {wanted!r}; {nearest(wanted, list(arrays))}")
    found = [name for name in ([wanted] if wanted else arrays) if fits(arrays[name])]
    if len(found) > 1 or (wanted and not found):
        what = f"which array holds the {kind}s?" if found else f"array {wanted!r} does not hold the {kind}s."
        raise InputError(f"{path}: {what} Name it with data.{kind}_column; it has {', '.join(arrays)}")
    return arrays[found[0]] if found else None


# ---------------------------------------------------------------------------------------------------------- tables
def _parquet(files: list[Path], image_column: str | None, label_column: str | None) -> Pictures:
    import datasets
    from pyarrow import ArrowException, parquet

    try:
        features = datasets.Features.from_arrow_schema(parquet.read_schema(files[0]))
    except (ArrowException, OSError) as error:
        raise InputError(f"{files[0]}: not a readable parquet file ({first_line(error)}); download it again") from None
    rows = ((f"{f.name} [{n}]", row, f.parent) for f in files for n, row in enumerate(parquet_rows(f)))
    return _table(rows, features, image_column, label_column, str(files[0]))


def _hub(
    name: str, split: str | None, image_column: str | None, label_column: str | None, limit: int | None
) -> Pictures:
    import datasets

    seen: dict[str, Any] = {}

    def undecoded(data: Any) -> Any:
        """Images stay bytes, so that one which is broken does not end the reading."""
        seen.update(data.features or {})
        for column, feature in seen.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        return data

    rows = hub_rows(name, split, limit, undecoded)
    first = next(rows, None)  # the features are known once reading has begun
    if first is None:
        return Pictures(())
    named = ((f"{name} [{n}]", row, Path()) for n, row in enumerate(chain([first], rows)))
    return _table(named, seen, image_column, label_column, name)


def _table(
    rows: Iterable[tuple[str, dict[str, Any], Path]],
    features: Any,
    image_column: str | None,
    label_column: str | None,
    source: str,
) -> Pictures:
    import datasets

    def column(wanted: str | None, kind: type, usual: tuple[str, ...]) -> str | None:
        if wanted is not None and wanted not in features:
            raise InputError(f"{source}: no column {wanted!r}; {nearest(wanted, list(features))}")
        typed = [name for name, feature in features.items() if isinstance(feature, kind)]
        return wanted or next((name for name in [*typed, *usual] if name in features), None)

    image = column(image_column, datasets.Image, ("image", "img", "jpg", "png"))
    if image is None:
        raise InputError(
            f"{source}: which column is the image? Name it with data.image_column; it has {', '.join(features)}"
        )
    label = None
    if label_column != NO_LABELS:
        label = column(label_column, datasets.ClassLabel, ("label", "labels", "fine_label"))
    classes = getattr(features.get(label), "names", None) if label else None

    def found() -> Iterator[Picture]:
        for name, row, folder in rows:
            yield name, lambda value=row[image], at=folder: _value(value, at), row[label] if label else None

    return Pictures(found(), classes)


def _value(value: Any, folder: Path) -> Any:
    """An image as tables hold it: {"bytes", "path"}, bytes, or the path of a file beside the table."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes):
        raise Unreadable(f"a {type(value).__name__} where an image should be")
    return decode(folder / value if isinstance(value, str) else value)
