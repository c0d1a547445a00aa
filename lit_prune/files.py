"""Files and folders that appear whole or not at all, as readable as the user's umask says."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_prune.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def follow_umask(path: Path) -> None:
    """Give a file, or every file in a folder, the mode that `open` would have given it.

    Temporary files and those that safetensors writes are readable by their owner only.

    Args:
        path: A file or a folder.
    """
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


@contextmanager
def written_at_once(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` that takes its place if nothing is raised.

    Args:
        out: The folder to make; one that is there is replaced.
    """
    clear_leftovers(out)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    aside = out.with_name(f"{out.name}.old-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        follow_umask(temporary)
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
        if out.exists():
            out.rename(aside)
        temporary.rename(out)
        _sync(out.parent)
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(out: Path) -> None:
    """Remove what a killed `written_at_once` left beside a folder; put back what it moved aside.

    Args:
        out: The folder, there or not.
    """
    mine = re.compile(re.escape(out.name) + r"\.(tmp|old)-\d+")
    for path in sorted(out.parent.iterdir()):
        if match := mine.fullmatch(path.name):
            if match[1] == "old" and not out.exists():
                path.rename(out)
            else:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def file_written_at_once(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` for a file that takes its place if nothing is raised.

    Args:
        path: The file to make; its folder exists.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        follow_umask(temporary)
        _sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say where
        raise


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before a rename makes them count."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # which some file systems do not sync
            raise
    finally:
        os.close(number)


@contextmanager
def folder_errors(out: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into one line.

    Args:
        out: The folder that is written.

    Raises:
        UserError: Instead of what the file system raised inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(out, error) from error
        if error.errno in _NO_ACCESS:
            raise UserError(
                f"expected a folder that can be written for {out}, got: {error.strerror}; "
                f"choose another one"
            ) from error
        raise
    except UserError:
        raise
    except Exception as error:  # Rust's, of safetensors and tokenizers, have it in the text only
        if any(f"os error {code})" in str(error) for code in _NO_ROOM):
            raise _no_room(out, error) from error
        raise


def _no_room(out: Path, error: Exception) -> UserError:
    return UserError(
        f"expected enough disk space to write {out}, got: {error}; nothing was left behind, "
        f"free some space or choose another folder"
    )
