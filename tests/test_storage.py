"""Files and folders appear whole or not at all."""

import errno
import os
import stat

import pytest

from linearize import storage
from linearize.storage import atomic_folder, write_atomic
from linearize.types import InputError, StorageError


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_writes_text_and_bytes_and_makes_parents(tmp_path):
    write_atomic(tmp_path / "a" / "b.txt", "größe")
    write_atomic(str(tmp_path / "c"), b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "größe"
    assert (tmp_path / "c").read_bytes() == b"\x00\xff"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"]


def test_write_atomic_gives_the_usual_mode_and_keeps_an_old_one(tmp_path):
    write_atomic(tmp_path / "new", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").chmod(0o640)
    write_atomic(tmp_path / "plain", "y")
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_on_a_full_disk(tmp_path, monkeypatch, step):
    write_atomic(tmp_path / "f", "old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(StorageError, match="no space left") as caught:
        write_atomic(tmp_path / "f", "new")
    assert "\n" not in str(caught.value) and str(tmp_path / "f") in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_atomic_folder_appears_whole(tmp_path):
    target = tmp_path / "runs" / "one"
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "x").write_text("1")
        (part / "sub" / "x").chmod(0o600)
        assert part.parent == target.parent and not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    (tmp_path / "plain").write_text("1")
    assert (target / "sub" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [p.name for p in target.parent.iterdir()] == ["one"]


def test_atomic_folder_leaves_nothing_on_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a" / "b") as part:
        (part / "x").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_on_a_full_disk(tmp_path):
    with pytest.raises(StorageError, match="no space left"), atomic_folder(tmp_path / "b"):
        full()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_met_by_safetensors_is_told_the_same_way(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(StorageError, match="no space left"), atomic_folder(tmp_path / "b"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "b"):
        _ = 1 / 0


def test_atomic_folder_refuses_what_is_not_empty(tmp_path):
    (tmp_path / "b").mkdir()
    with atomic_folder(tmp_path / "b") as part:  # empty: allowed
        (part / "x").write_text("1")
    with pytest.raises(InputError, match="not empty"), atomic_folder(tmp_path / "b"):
        pass
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "b" / "x"):
        pass
    assert (tmp_path / "b" / "x").read_text() == "1"


def test_atomic_folder_overwrites_only_when_complete(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "b") as part:
        (part / "x").write_text("1")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "b", overwrite=True) as part:
        (part / "x").write_text("2")
        raise ValueError
    assert (tmp_path / "b" / "x").read_text() == "1"

    real, calls = os.rename, []

    def second_rename_fails(src, dst):
        calls.append(dst)
        if len(calls) == 2:
            full()
        real(src, dst)

    monkeypatch.setattr(storage.os, "rename", second_rename_fails)
    with pytest.raises(StorageError), atomic_folder(tmp_path / "b", overwrite=True) as part:
        (part / "x").write_text("2")
    assert (tmp_path / "b" / "x").read_text() == "1" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    with atomic_folder(tmp_path / "b", overwrite=True) as part:
        (part / "y").write_text("2")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["y"] and len(list(tmp_path.iterdir())) == 1
