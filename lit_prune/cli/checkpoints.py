"""Which checkpoint a run goes on from: a whole one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator
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
#: What every checkpoint of a Lightning trainer holds.
_OF_LIGHTNING = {"state_dict", "global_step", "pytorch-lightning_version"}


def find_checkpoint(folder: Path, wanted: str | None) -> tuple[str | None, list[str]]:
    """Resolve `--ckpt_path`.

    Args:
        folder: The run's folder.
        wanted: A path, `last` for the folder's newest whole one, or None.

    Returns:
        The path, or None if none is wanted or the folder has none yet; and what is wrong with those
        that were passed over, a line for each.

    Raises:
        UserError: The path does not exist, or it or all in the folder are unfit.
    """
    if wanted is None:
        return None, []
    if wanted == "last":
        return _newest_whole(folder)
    if "://" in wanted:
        raise UserError(
            f"expected a checkpoint file as --ckpt_path, got the address {wanted}: download it, "
            "and give the file"
        )
    path = Path(wanted).expanduser()
    if not path.exists():
        raise UserError(
            f"expected a checkpoint file as --ckpt_path, got {wanted}, which does not exist: give "
            "an existing one, or 'last' for that of the run's folder"
        )
    wrong = unfit(path)
    if wrong is not None:
        raise UserError(
            f"expected a whole Lightning checkpoint as --ckpt_path, got {wanted}, which {wrong}: "
            "give an older one, 'last' for the run's newest whole one, or --overwrite to start anew"
        )
    return str(path), []


def checkpoints_in(folders: Iterable[Path]) -> Iterator[Path]:
    """Find checkpoints, whole or not, but no half-written ones under a temporary name.

    Args:
        folders: Where to look, in subfolders too.

    Yields:
        Their paths.
    """
    for folder in folders:
        for path in folder.rglob("*.ckpt"):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield path


def _newest_whole(folder: Path) -> tuple[str | None, list[str]]:
    found = list(checkpoints_in([folder / FOLDER]))
    # as Lightning does it, the newest of last.ckpt, last-v1.ckpt, …; then all others
    found.sort(key=lambda p: (p.name.startswith("last"), p.lstat().st_mtime_ns), reverse=True)
    passed = []
    for path in found:
        wrong = unfit(path)
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


def unfit(path: Path) -> str | None:
    """Tell why no fit can go on from a file: it is damaged, or no checkpoint of Lightning's.

    Reads all of it, since torch does not compare checksums: it loads a file with flipped bits.
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
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:  # whole, with more than weights in it
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except Exception as error:  # a flipped bit can lead both readers anywhere
        if isinstance(error, MemoryError) or _NO_MAPPING in str(error):
            return None  # says nothing of the file
        return f"is truncated or no checkpoint ({str(error).partition(chr(10))[0]})"
    found = set(content) if isinstance(content, dict) else set()
    return None if found >= _OF_LIGHTNING else "is no Lightning checkpoint"
