"""Files and folders appear whole, and with the modes that the user's umask gives."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.errors import UserError
from lit_prune.files import (
    clear_leftovers,
    file_written_at_once,
    folder_errors,
    follow_umask,
    written_at_once,
)


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    out = tmp_path / "out"
    with written_at_once(out) as folder:
        (folder / "inner").mkdir()
        (folder / "a").write_text("x")
        save_file({"x": torch.ones(2)}, folder / "inner" / "x.safetensors")
        (folder / "private").touch(0o600)
    assert modes(out) == {0o666 & ~umask}
    assert os.umask(umask) == umask  # asked for, not changed
    (out / "a").chmod(0o600)
    follow_umask(out / "a")
    assert modes(out) == {0o666 & ~umask}


def test_a_folder_is_replaced_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with written_at_once(out) as folder:
        (folder / "new").touch()
        assert [path.name for path in out.iterdir()] == ["old"]
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]


def test_after_an_error_everything_is_as_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()

    def write(folder: Path) -> None:
        (folder / "new").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written_at_once(out) as folder:
        write(folder)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_a_folder_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced, sync = tmp_path / "out", set(), os.fsync

    def record(number: int) -> None:
        synced.add((os.fstat(number).st_ino, out.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", record)
    with written_at_once(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("x")
        (folder / "b").write_text("x")
        parts = [folder, *folder.rglob("*")]
        numbers = {path.stat().st_ino for path in parts}
    assert {(number, False) for number in numbers} | {(tmp_path.stat().st_ino, True)} == synced


def test_a_file_that_is_not_on_the_disk_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with written_at_once(tmp_path / "empty"):  # folders need not be synced everywhere
        pass
    with pytest.raises(OSError, match="No space left"), written_at_once(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert os.listdir(tmp_path) == ["empty"]


def test_what_a_kill_left_is_cleared(tmp_path: Path) -> None:
    for name in ("o.old-1", "o.tmp-1", "o.tmp-2", "o.old-backup", "oo.old-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    clear_leftovers(tmp_path / "o")  # killed between the two renames
    assert (tmp_path / "o/file").read_text() == "o.old-1"
    assert sorted(os.listdir(tmp_path)) == ["o", "o.old-backup", "oo.old-1"]
    (tmp_path / "o.old-3").mkdir()
    with written_at_once(tmp_path / "o") as folder:
        assert sorted(os.listdir(tmp_path)) == sorted(
            ["o", "o.old-backup", "oo.old-1", folder.name]
        )
        (folder / "file").write_text("new")
    assert (tmp_path / "o/file").read_text() == "new"


def test_a_file_is_replaced_at_once(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with file_written_at_once(path) as file:
        save_file({"x": torch.ones(2)}, file)  # for its owner only
        assert path.read_text() == "old"
        assert file.parent == path.parent
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert b"F32" in path.read_bytes()
    assert modes(tmp_path) == {0o666 & ~umask}


def test_a_file_that_is_not_whole_does_not_replace_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def interrupt(file: Path) -> None:
        file.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), file_written_at_once(path) as file:
        interrupt(file)

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # where a full disk may show first
    refused = pytest.raises(OSError, match="No space left")
    with refused as caught, file_written_at_once(path) as file:
        file.write_text("new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "enough disk space to write /x"),
        (errno.EFBIG, "enough disk space to write /x"),
        (errno.EACCES, "expected a folder that can be written for /x"),
        (errno.EEXIST, "expected a folder that can be written for /x"),
    ],
)
def test_disk_errors_are_the_users(number: int, words: str) -> None:
    with pytest.raises(UserError, match=words), folder_errors(Path("/x")):
        raise OSError(number, os.strerror(number))


def test_other_errors_are_not() -> None:
    with pytest.raises(OSError, match="Bad"), folder_errors(Path("/x")):
        raise OSError(errno.EBADF, "Bad file descriptor")
