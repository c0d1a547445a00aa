"""Which checkpoint a run goes on from: a whole one."""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from pathlib import Path

import torch

from lit_prune.errors import UserError

FOLDER = "checkpoints"
LAST = "last.ckpt"
#: The one before the last, for when that turns out to be damaged.
PREVIOUS = "previous.ckpt"
#: Added to the name of a damaged `LAST`, which would take the place of a whole `PREVIOUS`.
DAMAGED = ".damaged"
_LAST_OF_SHARDS = "meta.pt"
#: What torch says where a file can't be mapped, for lack of memory or by a file system.
_NO_MAPPING = "unable to mmap"
_KEYWORDS = ("best", "hpc")


def find_checkpoint(folder: Path, wanted: str | None) -> tuple[str | None, list[str]]:
    """Resolve `--ckpt_path`.

    Args:
        folder: The run's folder.
        wanted: A path, `last` for the folder's newest whole one, a word that Lightning knows, or
            None.

    Returns:
        The path, or None if none is wanted or the folder has none yet; and what is wrong with those
        that were passed over, a line for each.

    Raises:
        UserError: The path does not exist, or it or all in the folder are damaged.
    """
    if wanted is None or wanted in _KEYWORDS or re.match(r"\w+:", wanted):
        return wanted, []
    if wanted == "last":
        return _newest_whole(folder)
    if not Path(wanted).exists():
        raise UserError(
            f"expected a checkpoint file as --ckpt_path, got {wanted}, which does not exist: give "
            "an existing one, or 'last' for that of the run's folder"
        )
    wrong = damage(Path(wanted))
    if wrong is not None:
        raise UserError(
            f"expected a whole Lightning checkpoint as --ckpt_path, got {wanted}, which {wrong}: "
            "give an older one, 'last' for the run's newest whole one, or --overwrite to start anew"
        )
    return wanted, []


def _newest_whole(folder: Path) -> tuple[str | None, list[str]]:
    found = [path for path in (folder / FOLDER).glob("*.ckpt") if not path.name.startswith(".")]
    # as Lightning does it, the newest of last.ckpt, last-v1.ckpt, …; then all others
    found.sort(key=lambda p: (p.name.startswith("last"), p.lstat().st_mtime_ns), reverse=True)
    passed = []
    for path in found:
        wrong = damage(path)
        if wrong is None:
            if path.name == PREVIOUS and folder / FOLDER / LAST not in found:
                passed.append(f"{path.with_name(LAST)} is missing")  # killed while it was renamed
            return str(path), passed
        passed.append(f"{path} {wrong}")
    if passed:
        raise UserError(
            f"expected a whole checkpoint to go on from, but {'; '.join(passed)}: give --ckpt_path "
            "a file, or --overwrite to start anew"
        )
    return None, []


def damage(path: Path) -> str | None:
    """Tell what is wrong with a checkpoint's bytes.

    Reads all of them, since torch does not compare checksums: it loads a file with flipped bits.
    And lets torch open it, whose reader minds bytes that Python's does not.

    Args:
        path: A file, or the folder that a sharded model is saved as, of which only the file that is
            written last is looked for.

    Returns:
        What is wrong, to follow the file's name, or None.
    """
    if path.is_dir():
        return None if (path / _LAST_OF_SHARDS).is_file() else "is not complete"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad is not None:
            return f"is damaged (wrong checksum of {bad})"
        with contextlib.suppress(pickle.UnpicklingError):  # whole, with more than weights in it
            torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except Exception as error:  # a flipped bit can lead both readers anywhere
        if isinstance(error, MemoryError) or _NO_MAPPING in str(error):
            return None  # says nothing of the file
        return f"is truncated or no checkpoint ({str(error).partition(chr(10))[0]})"
    return None
