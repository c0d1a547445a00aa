"""The folder of one run: refused when it holds another run, left as found when the run fails."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Literal

from lit_prune.cli.checkpoints import (
    DAMAGED,
    FOLDER,
    LAST,
    checkpoints_in,
    find_checkpoint,
    unfit,
)
from lit_prune.cli.guard import is_rank_zero, say
from lit_prune.errors import UserError
from lit_prune.files import clear_leftovers

RUN_ENTRIES = (
    *("config.yaml", "checkpoints", "pruned", "adapter"),
    *("report.json", "report.html", "evaluation.json", "logs"),
)
ASIDE = ".replaced-"
CONFIG_MARK = "lit_prune=="
LINEAGE_FILE = "lit_prune.json"  # as in lit_prune.export, which is not imported for its name
_OLD = re.compile(r"\.old-\d+$")


class RunFolder:
    """Guards a run's folder from before the run to its end.

    Only entries of a run (`RUN_ENTRIES`, their temporary forms, and what an earlier process moved
    aside) are ever moved or deleted. Under several processes only the first one does anything.

    Args:
        path: The folder; need not exist.
        overwrite: Replace the run that it holds.
        ckpt_path: The checkpoint to go on from, `last` for the folder's own.

    Attributes:
        path: The folder.
        ckpt_path: The checkpoint to go on from, or None to start afresh.

    Raises:
        UserError: The folder holds a run that is neither resumed nor to be replaced, or the
            checkpoint is missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, ckpt_path: str | None = None
    ) -> None:
        self.path = Path(path).expanduser()
        self.acts = is_rank_zero()
        self._replace = overwrite
        self._aside: Path | None = None
        self._made: list[Path] = []
        if ckpt_path is not None and overwrite:
            raise UserError(
                "expected --overwrite or --ckpt_path, got both: leave out one of them, since one "
                "starts anew and the other goes on"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"expected a folder for the run, got the file {self.path}")
        self._before = set(_names(self.path))
        self.ckpt_path, self._passed = self._checkpoint(ckpt_path)
        if self.acts:
            self._check(resumes=ckpt_path is not None)

    def __enter__(self) -> RunFolder:
        """Make the folder, or move the run that is to be replaced aside."""
        if not self.acts:
            return self
        try:
            self._make()
            if self._replace and self._entries():
                self._move_aside()
            elif self.ckpt_path is not None:
                self._tidy()
        except OSError as error:
            self._restore()
            raise UserError(
                f"expected a folder that can be written, got {self.path} ({error.strerror}): "
                "choose another --trainer.default_root_dir"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Literal[False]:
        """Drop the replaced run after success, undo everything after an error that left nothing."""
        if self.acts:
            if kind is None:
                self._drop_replaced()
            elif not worth_keeping(self.path, but=self._before):
                self._restore()
        return False

    def _checkpoint(self, wanted: str | None) -> tuple[str | None, list[str]]:
        found, passed = find_checkpoint(self.path, wanted)
        if wanted == "last" and found is None:
            if self._entries() and worth_keeping(self.path):
                raise UserError(
                    f"expected {self.path}/checkpoints/last.ckpt to go on from, but {self.path} "
                    "has results without it: give --ckpt_path a file, or --overwrite to start anew"
                )
            self._replace = True  # killed before its first checkpoint: starting anew loses nothing
            if self.acts and self._entries():
                say(f"{self.path} holds a run without a checkpoint yet: it starts anew")
        if self.acts and passed:
            say(f"{'; '.join(passed)}: going on from {found}")
        return found, passed

    def _tidy(self) -> None:
        """Remove what a kill left half-written, and put a damaged checkpoint out of the way."""
        for name in RUN_ENTRIES:
            clear_leftovers(self.path / name)
        folder = self.path / FOLDER
        for path in folder.rglob(".*.ckpt.tmp*"):
            _remove(path)
        last = folder / LAST
        if last.is_dir() or not os.path.lexists(last):
            return
        if last.resolve() == Path(self.ckpt_path or "").resolve():
            return  # found to be whole
        wrong = unfit(last)
        if wrong is not None:
            aside = folder / f"{LAST}{DAMAGED}"
            last.replace(aside)
            if not self._passed:  # which has been said
                say(f"{last} {wrong}: it is now {aside.name}")

    def _check(self, *, resumes: bool) -> None:
        entries = self._entries()
        if not entries or (resumes and not self._replace):
            return
        found = ", ".join(entries)
        if not self._replace:
            raise UserError(
                f"expected an empty or new folder, but {self.path} holds a run ({found}): choose "
                "another --trainer.default_root_dir, go on with --ckpt_path last, or replace it "
                "with --overwrite"
            )
        if not _is_ours(self.path):
            raise UserError(
                f"expected a run of lit-prune to replace, but {self.path} holds {found} of another "
                "origin: choose another --trainer.default_root_dir"
            )

    def _entries(self) -> list[str]:
        return sorted(name for name in _names(self.path) if is_run_entry(name))

    def _make(self) -> None:
        if self.path.is_dir():
            probe = self.path / f".{os.getpid()}.probe"
            probe.mkdir()
            probe.rmdir()
            return
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True)

    def _move_aside(self) -> None:
        entries, number = self._entries(), os.getpid()
        while (self.path / f"{ASIDE}{number}").exists():  # left by a killed process of this number
            number += 1
        self._aside = self.path / f"{ASIDE}{number}"
        self._aside.mkdir()
        for name in entries:
            (self.path / name).rename(self._aside / name)

    def _restore(self) -> None:
        moved = set(_names(self._aside)) if self._aside else set()
        for name in self._entries():
            path = self.path / name
            if path != self._aside and (name in moved or name not in self._before):
                _remove(path)
        if self._aside is not None:
            for name in moved:
                (self._aside / name).rename(self.path / name)
            with contextlib.suppress(OSError):
                self._aside.rmdir()
        for path in self._made:
            with contextlib.suppress(OSError):  # others may have put something there
                path.rmdir()

    def _drop_replaced(self) -> None:
        for name in _names(self.path):
            if name.startswith(ASIDE):
                _remove(self.path / name)


def is_run_entry(name: str) -> bool:
    """Tell whether a name in a run's folder is the run's.

    Args:
        name: The name of a file or folder.

    Returns:
        True for the entries of a run, their temporary names (`.pruned.…`, `report.json.…`), what is
        moved aside while one is replaced (`pruned.old-7`), and runs moved aside.
    """
    bare = name.removeprefix(".")
    temporary = any(
        bare != entry and bare.startswith((f"{entry}.", f"{entry}-")) for entry in RUN_ENTRIES
    )
    return (
        name in RUN_ENTRIES
        or name.startswith(ASIDE)
        or (temporary and (name.startswith(".") or ".tmp" in name or bool(_OLD.search(name))))
    )


def worth_keeping(path: Path, but: Collection[str] = ()) -> bool:
    """Tell whether a run left something that can be used.

    Args:
        path: The run's folder.
        but: Names in it that are not looked at unless they are a run's.

    Returns:
        True if it has a checkpoint, wherever in the folder, or a pruned model.
    """
    names = [name for name in _names(path) if is_run_entry(name) or name not in but]
    looked_at = [path / name for name in names if not name.startswith(".")]
    exports = [folder for folder in looked_at if _OLD.sub("", folder.name) == "pruned"]
    saved = any(path.suffix == ".ckpt" for path in looked_at) or any(checkpoints_in(looked_at))
    return saved or any(map(_names, exports))


def _is_ours(path: Path) -> bool:
    """Recognise a run by what only this project writes; other people's files are not replaced."""
    if any(name.startswith(ASIDE) for name in _names(path)):
        return True
    config = path / "config.yaml"
    if config.is_file():
        return CONFIG_MARK in config.read_text(encoding="utf-8", errors="replace")[:200]
    if (path / "pruned" / LINEAGE_FILE).is_file():
        return True
    return not any(child.is_file() for name in RUN_ENTRIES for child in (path / name).rglob("*"))


def _names(path: Path | None) -> list[str]:
    return sorted(os.listdir(path)) if path is not None and path.is_dir() else []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
