"""Files that are there whole or not at all: written beside their target, synced, then renamed over it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _sync(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder; the rename is atomic all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(target: str | Path) -> Iterator[None]:
    """Turns an OSError, or a full disk reported by safetensors, into a StorageError of one line naming `target`."""
    try:
        yield
    except Exception as error:
        why = reason(error)
        if why is None:
            raise
        from linearize.types import StorageError  # here: it needs torch, and reading a recipe should not

        raise StorageError(f"cannot write {target}: {why}; nothing was left behind there") from error


def reason(error: Exception) -> str | None:
    """Why a write failed, with what to do; None if it is not a storage error."""
    number = error.errno if isinstance(error, OSError) else None
    # safetensors raises its own error class, with the system's number in the text.
    if number in _FULL or "os error 28" in str(error).lower() or "No space left" in str(error):
        return "no space left on the disk (free some, or choose another folder with --output-dir)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "no permission (choose another folder with --output-dir)"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{os.strerror(number)}: a file stands where a folder is needed, or the other way round"
    return str(error) if isinstance(error, OSError) else None


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Writes `data` to `path` through a temporary sibling. Text is UTF-8. Raises StorageError."""
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def check_target(target: str | Path, overwrite: bool = False) -> Path:
    """`target` as a path that a folder may be written to.

    Raises InputError where it is a file, or a folder with something in it and `overwrite` is off.
    """
    from linearize.types import InputError

    target = Path(target)
    if target.is_file():
        raise InputError(f"output folder {target} is a file: choose another with --output-dir")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise InputError(f"output folder {target} is not empty: choose another with --output-dir, or empty it")
    return target


@contextmanager
def atomic_folder(target: str | Path, overwrite: bool = False, part: Path | None = None) -> Iterator[Path]:
    """Yields an empty folder to fill; on a clean exit it becomes `target`, otherwise it vanishes.

    part: where it is filled (on the same file system; what a killed run left there goes); None: a new sibling.
    With `overwrite` an existing folder stays in place until the new one is complete and synced. Raises InputError
    for a target that is not empty (without `overwrite`), StorageError where writing fails.
    """
    target = check_target(target, overwrite)
    with storage_errors(target):
        made = _make_parents(target.parent)
        if part is None:
            part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        else:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        try:
            yield part
            for folder, _, files in os.walk(part):
                for name in files:
                    file = Path(folder) / name
                    file.chmod(file.stat().st_mode | (0o666 & ~_umask()))  # safetensors writes for the owner alone
                    _sync(file)
                _sync(Path(folder))
            part.chmod(0o777 & ~_umask())
            _move(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise
        _sync(target.parent)


def _move(part: Path, target: Path) -> None:
    """Renames `part` to `target`; an old `target` is kept aside until the rename has happened."""
    if not target.exists():
        os.rename(part, target)
        return
    if not any(target.iterdir()):
        target.rmdir()
        os.rename(part, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    os.rename(target, aside / "old")
    try:
        os.rename(part, target)
    except BaseException:
        os.rename(aside / "old", target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _make_parents(folder: Path) -> list[Path]:
    """Makes `folder` and its parents; returns those that were made, innermost first."""
    made = []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    for new in reversed(made):
        new.mkdir(exist_ok=True)
    return made


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
