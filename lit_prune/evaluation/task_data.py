"""Local jsonl files as data of lm-eval's tasks: one file per task and split, with raw fields."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_prune.errors import UserError

Record = dict[str, Any]


@dataclass(frozen=True)
class TaskFiles:
    """The files that a task reads.

    Attributes:
        evaluation: Split that is scored, as the task's definition names it.
        fewshot: Split that examples come from, or None.
        paths: The file of each of these splits.
    """

    evaluation: str
    fewshot: str | None
    paths: Mapping[str, Path]

    @property
    def scored(self) -> Path:
        """The file of the split that is scored."""
        return self.paths[self.evaluation]


def find_files(
    folder: str | Path, task: str, definition: Mapping[str, Any], fewshot: int
) -> TaskFiles | str:
    """Find a task's files in a folder.

    `TASK.jsonl` and `TASK-NUMBER.jsonl` (a part of it) are the split that lm-eval scores: the
    task's test split, or its validation split if it has none. `TASK_SPLIT.jsonl`,
    `TASK.SPLIT.jsonl` and `TASK-SPLIT.jsonl` are the named split.

    Args:
        folder: The folder.
        task: lm-eval's name of the task.
        definition: lm-eval's definition of it.
        fewshot: Number of examples before each item.

    Returns:
        The files, or why the task can't be run with what is there.

    Raises:
        UserError: It has two files for the same split.
    """
    if "class" in definition or definition.get("custom_dataset"):
        return "lm-eval makes its data in Python, so that no file can take their place"
    scored = definition.get("test_split") or definition.get("validation_split")
    if not scored:
        return "lm-eval's definition has neither a test nor a validation split"
    wanted = [scored]
    examples = _fewshot_split(definition) if fewshot else None
    if examples and examples != scored:
        wanted.append(examples)
    paths = {}
    for split in wanted:
        path = _find(Path(folder), task, split, split == scored)
        if path is None:
            name = f"{task}.jsonl" if split == scored else f"{task}_{split}.jsonl"
            why = "" if split == scored else f", for {fewshot}-shot"
            return f"no data: {name} is not in {Path(folder).name}{why}"
        paths[split] = path
    return TaskFiles(scored, examples, paths)


def _fewshot_split(definition: Mapping[str, Any]) -> str | None:
    """Where lm-eval takes examples from; None if they are written in the definition."""
    options = definition.get("fewshot_config") or {}
    named = options.get("split") or definition.get("fewshot_split")
    if named or options.get("samples") is not None:
        return named
    splits = (definition.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    return next(filter(None, splits), None)


def _find(folder: Path, task: str, split: str, is_scored: bool) -> Path | None:
    suffix = rf"[_.-]{re.escape(split)}" + (r"|-\d+|" if is_scored else "")
    name = re.compile(rf"{re.escape(task)}(?:{suffix})\.jsonl")
    found = sorted(path for path in folder.iterdir() if name.fullmatch(path.name))
    if len(found) > 1:
        raise UserError(
            f"expected one file for the {split} split of {task} in {folder}, got "
            f"{' and '.join(path.name for path in found)}; keep one of them"
        )
    return found[0] if found else None


def digest(paths: Sequence[Path]) -> str:
    """Start of the SHA-256 of the content of files, one after the other."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return content.hexdigest()[:16]


def read_records(path: Path) -> list[Record]:
    """Read a jsonl file.

    Args:
        path: The file, a JSON object per line.

    Raises:
        UserError: It is empty, or a line is something else; the message says which.
    """
    records = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a jsonl file in UTF-8, got {path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"expected JSON in line {number} of {path}, got {error}") from error
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"expected a JSON object in line {number} of {path}, got a {kind}")
        records.append(record)
    if not records:
        raise UserError(f"expected records in {path}, got an empty file")
    return records


def overrides(
    definition: Mapping[str, Any], files: TaskFiles, records: Mapping[str, Sequence[Record]]
) -> dict[str, Any]:
    """What replaces a definition's data: its splits, in memory; the rest of it stays.

    Args:
        definition: lm-eval's definition of the task.
        files: The task's files.
        records: What the file of each split holds.

    Returns:
        Entries for the task's definition.

    Raises:
        UserError: A field has values of different kinds.
    """
    from datasets import DatasetDict

    splits: Any = {split: _table(part, files.paths[split]) for split, part in records.items()}

    def load(**_: Any) -> Any:
        return DatasetDict(splits)

    changed: dict[str, Any] = {"custom_dataset": load, "dataset_kwargs": None}
    for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
        split = definition.get(name)
        changed[name] = split if split in splits else None
    if files.fewshot is None and (definition.get("fewshot_config") or {}).get("split"):
        changed["fewshot_config"] = None
    return changed


def _table(records: Sequence[Record], path: Path) -> Any:
    """Records as a data set; a JSON reader would take texts like 2012-01-01 for dates.

    Raises:
        UserError: A field has values of different kinds.
    """
    import pyarrow
    from datasets import Dataset

    fields = list(dict.fromkeys(field for record in records for field in record))
    full = [{field: record.get(field) for field in fields} for record in records]
    mixed = (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError)

    def made(number: int) -> Any:
        try:
            return Dataset.from_list(full[:number])
        except mixed as error:
            return error

    found = made(len(full))
    if not isinstance(found, mixed):
        return found
    number = first_failing(len(full), lambda number: isinstance(made(number), mixed))
    raise UserError(
        f"expected values of one kind in each field of {path}, got another in record {number}: "
        f"{found}"
    ) from found


def first_failing(total: int, fails: Callable[[int], bool]) -> int:
    """The number of the first record that spoils a file, by halves.

    Args:
        total: How many there are; with all of them it fails.
        fails: Whether it fails with so many of the first ones.
    """
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle, high)
    return high


def present(record: Mapping[str, Any]) -> Record:
    """A record without the fields that are null in it or missing from it."""
    return {field: value for field, value in record.items() if value is not None}


def needed(definition: Mapping[str, Any]) -> list[str]:
    """Fields that the templates of a task's definition read; functions don't tell theirs."""
    from jinja2 import Environment, meta

    found: set[str] = set()
    for part in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        text = definition.get(part)
        if isinstance(text, str):
            named = meta.find_undeclared_variables(Environment().parse(text))
            found |= {text} if text.isidentifier() else named
    return sorted(found)


def misfit(
    task: str, path: Path, number: int, record: Record, error: Exception, fields: Sequence[str] = ()
) -> UserError:
    """The error for a record that a task's definition can't be applied to.

    Args:
        task: The task.
        path: The record's file.
        number: Its number in the file, from 1.
        record: Its values, None for fields of other records.
        error: What was raised.
        fields: Those that the task is known to need.
    """
    own = present(record)
    undefined = re.match(r"'(\w+)' is undefined", str(error))
    asked = error.args[0] if isinstance(error, KeyError) else undefined and undefined[1]
    lost = [asked] if asked and asked not in map(str, own.values()) else []
    lost += [field for field in fields if field not in own]
    where = f"in record {number} of {path}"
    if lost:
        return UserError(
            f"expected the field '{lost[0]}', which {task} needs, got {', '.join(own)} {where}; "
            "give the raw fields of the hub's data set"
        )
    null = ", ".join(f"'{field}'" for field in record if field not in own)
    got = (str(error) or repr(error)).splitlines()[0]
    rest = f"; it has no {null}" if null else ""
    return UserError(f"expected a record that fits {task}, got another {where}: {got}{rest}")
