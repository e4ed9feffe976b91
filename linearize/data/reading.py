"""Rows out of files, folders and hub datasets: what texts, chats, sentences and pairs are read from."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from linearize.types import InputError, LinearizeError, StorageError, nearest

END_OF_TEXT = "<|endoftext|>"
PLAIN = {".txt", ".text", ".md"}

_JSON, _TABLE = {".jsonl", ".ndjson", ".json"}, {".csv", ".tsv"}
_KNOWN = PLAIN | _JSON | _TABLE | {".parquet"}
_SLICE = re.compile(r"(?P<name>[^\[\]]*)\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\]")
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")

Row = str | dict[str, Any]


def column_of(row: dict[str, Any], wanted: str | None, source: str | Path) -> str:
    """The column that holds the text: `wanted`, "text", or the only one of strings. Raises InputError."""
    if wanted is not None:
        if wanted not in row:
            raise InputError(f"{source}: no column {wanted!r}; {nearest(wanted, list(row))}")
        return wanted
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise InputError(f"{source}: which column is the text? Name it with data.text_column; it has {', '.join(row)}")


def read_rows(source: str | Path, split: str | None, limit: int | None, *, lines: bool = False) -> Iterator[Row]:
    """The rows of a source as `text.read_texts` takes it: dicts, or strings from plain text. lines: each line of plain
    text that is not blank is a row. Raises InputError, StorageError."""
    path = located(source, _KNOWN)
    if path is None:
        return islice(hub_rows(str(source), split, limit), limit)
    name, cut = split_of(split)
    rows = (row for file in _files(path, name) for row in read_file(file, lines=lines))
    return islice(cut(list(rows)) if split and "[" in split else rows, limit)


def located(source: str | Path, suffixes: Iterable[str]) -> Path | None:
    """The file or folder of `source`; None where it is a hub dataset's name. Raises InputError where it is neither."""
    path, name = Path(source).expanduser(), str(source)
    if path.exists():
        return path
    if path.suffix.lower() in suffixes or name[:1] in "./~" or not _HUB.fullmatch(name):
        raise InputError(f"{source}: no such file or folder; check the path given as data.source (--dataset)")
    return None


def split_of(split: str | None) -> tuple[str | None, Callable[[list[Any]], list[Any]]]:
    """(name, what cuts the wanted rows out) of a split: "train[:5%]" is of "train" the first 5 %."""
    found = _SLICE.fullmatch(split) if split else None
    if found is None:
        return split, lambda rows: rows
    edges = found["start"] or "0%", found["stop"] or "100%"
    return found["name"] or None, lambda rows: rows[slice(*(_edge(edge, len(rows)) for edge in edges))]


def _edge(text: str, size: int) -> int:
    return size * int(text[:-1]) // 100 if text.endswith("%") else int(text)


def _files(path: Path, split: str | None) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in _KNOWN:
            raise InputError(f"{path}: unknown kind of file; use one of {', '.join(sorted(_KNOWN))}")
        if split not in (None, "train", "all"):
            raise InputError(f"{path}: one file has no split {split!r}; cut documents out with '[100:200]' or leave it")
        return [path]
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in _KNOWN and f.name[0] != ".")
    if not files:
        raise InputError(f"{path}: no file with a suffix of {', '.join(sorted(_KNOWN))} in this folder")
    if split is None:
        return files
    chosen = [f for f in files if split in re.split(r"[\W_]+", f.stem) or split in f.relative_to(path).parts]
    if not chosen:
        raise InputError(f"{path}: no file of split {split!r}; it has {', '.join(f.name for f in files[:5])}")
    return chosen


def read_file(path: Path, *, lines: bool = False) -> Iterator[Row]:
    """The rows of one file; lines: as in `read_rows`. Raises InputError, StorageError."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from parquet_rows(path)
        return
    text = read_text(path)
    if kind in PLAIN and lines:
        yield from (line.strip() for line in text.replace(END_OF_TEXT, "\n").split("\n") if line.strip())
    elif kind in PLAIN:
        yield from (piece.strip() for piece in text.split(END_OF_TEXT)) if END_OF_TEXT in text else [text]
    elif kind in _TABLE:
        csv.field_size_limit(sys.maxsize)
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")
    elif kind == ".json" and text.lstrip()[:1] == "[":
        yield from (_object(item, path, 1) for item in _json(text, path, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _object(_json(line, path, number), path, number)


def read_text(path: Path) -> str:
    """The file's text, lines ending in "\\n". Raises InputError where it is not UTF-8, StorageError."""
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it with `iconv -t UTF-8`") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def _json(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}, line {line}: not JSON ({error}); one object per line is expected") from None


def _object(value: Any, path: Path, line: int) -> Row:
    if not isinstance(value, str | dict):
        raise InputError(f"{path}, line {line}: expected an object or a string, found {type(value).__name__}")
    return value


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Row by row. Raises InputError where the file is damaged."""
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)}); download it again") from None


def hub_rows(
    name: str, split: str | None, limit: int | None, prepare: Callable[[Any], Any] = lambda data: data
) -> Iterator[Any]:
    """Rows of a hub dataset (`name` or `name:config`); prepare: what becomes of the `datasets` object first.
    Raises InputError where it cannot be loaded."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    repository, _, config = name.partition(":")
    try:
        # Streaming spares a limited read the download of everything.
        stream = limit is not None and "[" not in (split or "")
        rows = datasets.load_dataset(repository, config or None, split=split or "train", streaming=stream)
        yield from prepare(rows)
    except LinearizeError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"dataset {name!r} could not be loaded ({reason}); give a file, a folder, or a hub id that can be reached"
        ) from error


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
