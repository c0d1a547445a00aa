"""What was measured of a model: a file of plain JSON that later measurements add to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_prune.errors import UserError
from lit_prune.evaluation.texts import protocol
from lit_prune.files import file_written_at_once

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
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with file_written_at_once(path) as file:
        file.write_text(text, encoding="utf-8")


def added(record: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """A record with what was measured of the same model before.

    Perplexities of other protocols stay; so do tasks, speed and the dense model's figures unless
    they were measured again.

    Args:
        record: New measurements.
        before: Earlier ones, or None.

    Returns:
        A record of all.
    """
    found = dict(record)
    if before is not None and before["model"]["digest"] == record["model"]["digest"]:
        for role in ("model", "dense"):
            found[role] = _added(record[role], before[role])
    with_ratios(found["model"], found["dense"])
    return found


def _added(new: Entry | None, old: Entry | None) -> Entry | None:
    if new is None or old is None:
        return new or old
    if new["digest"] != old["digest"]:
        return new
    again = {protocol(each) for each in new["perplexity"]}
    kept = [each for each in old["perplexity"] if protocol(each) not in again]
    return {
        **new,
        "perplexity": [*kept, *new["perplexity"]],
        "tasks": new["tasks"] or old["tasks"],
        "speed": new["speed"] or old["speed"],
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
