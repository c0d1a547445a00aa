"""What was measured of a model: a file of plain JSON that later measurements add to."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_prune.errors import UserError
from lit_prune.evaluation.texts import protocol
from lit_prune.files import file_written_at_once, folder_errors

FILE = "evaluation.json"
_PARTS = ("source", "cost", "perplexity")

Entry = dict[str, Any]


def read_record(path: Path) -> dict[str, Any]:
    """Read what was measured.

    Args:
        path: The file.

    Returns:
        `model` and `dense` (an entry or None), `versions`, `warnings`.

    Raises:
        UserError: It can't be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for entry in (found["model"], found["dense"]) if entry is not None]
        complete = all(part in entry for entry in entries for part in _PARTS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"expected a record of lit-prune evaluate, got {path} ({error}); measure again"
        ) from error
    if not complete:
        raise UserError(f"expected a record of lit-prune evaluate, got {path}; measure again")
    return found


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write what was measured, at once.

    Args:
        record: See `read_record`.
        path: The file.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with _file_errors(path), file_written_at_once(path) as file:
        file.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Make the folder of a record, and refuse a place where none can be written.

    Args:
        path: The file.

    Raises:
        UserError: It is a folder, or can't be made.
    """
    if path.is_dir():
        raise UserError(f"expected a file for the figures, got the folder {path}; name a file")
    with _file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        with folder_errors(path):
            yield
    except OSError as error:
        raise UserError(
            f"expected a file that can be written at {path}, got: {error.strerror}; choose another"
        ) from error


def fingerprint(folder: str | Path) -> str | None:
    """Tells weights on the disk apart, in a moment: a digest of their headers and some values.

    It does not depend on the dtype that a model is loaded in.

    Args:
        folder: A checkpoint.

    Returns:
        16 hexadecimal digits, or None where there are no .safetensors that can be read.
    """
    paths = sorted(Path(folder).glob("*.safetensors"))
    found = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = file.read(min(length, path.stat().st_size))
                found.update(header)
                tensors = json.loads(header)
                tensors.pop("__metadata__", None)
                for entry in tensors.values():
                    file.seek(8 + length + entry["data_offsets"][0])
                    found.update(file.read(64))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found.hexdigest()[:16] if paths else None


def same_model(one: Entry, other: Entry) -> bool:
    """Whether two entries are of the same weights, whatever dtype they were loaded in."""
    if one.get("files") and other.get("files"):
        return one["files"] == other["files"]
    return one["digest"] == other["digest"]


def added(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record with what was measured of the same model before.

    Perplexities of other protocols stay; so do tasks and the dense model's figures unless they were
    measured again. Speeds stay if none was measured now and the dense model is the same, which
    their ratios are to.

    Args:
        record: New measurements.
        before: Earlier ones, or None.

    Returns:
        A record of all.
    """
    found = dict(record)
    if before is not None and same_model(before["model"], record["model"]):
        timed = any(entry and entry.get("speed") for entry in (record["model"], record["dense"]))
        for role in ("model", "dense"):
            found[role] = _added(record[role], before[role], keeps_speed=not timed)
        if not timed and before["dense"] and not same_model(before["dense"], found["dense"]):
            found["model"]["speed"] = None
        found["warnings"] = list(dict.fromkeys([*before["warnings"], *record["warnings"]]))
    elif before is not None:
        text = "earlier figures were of other weights, and are replaced"
        found["warnings"] = list(dict.fromkeys([text, *record["warnings"]]))
    with_ratios(found["model"], found["dense"])
    return found


def _added(new: Entry | None, old: Entry | None, *, keeps_speed: bool) -> Entry | None:
    if old is None or (new is not None and not same_model(new, old)):
        return None if new is None else dict(new)
    old_speed = old.get("speed") if keeps_speed else None
    if new is None:
        return {**old, "speed": old_speed}
    again = {protocol(each) for each in new["perplexity"]}
    kept = [each for each in old["perplexity"] if protocol(each) not in again]
    return {
        **new,
        "perplexity": [*kept, *new["perplexity"]],
        "tasks": new["tasks"] or old.get("tasks"),
        "speed": new["speed"] or old_speed,
    }


def with_ratios(entry: Entry, dense: Entry | None) -> None:
    """Write into each perplexity its ratio to the dense model's of the same protocol.

    Args:
        entry: Changed in place.
        dense: The dense model's entry, if it was measured.
    """
    of = {protocol(each): each["value"] for each in (dense or {}).get("perplexity", ())}
    for each in entry["perplexity"]:
        reference = of.get(protocol(each))
        each["ratio"] = each["value"] / reference if reference and each["value"] else None
