"""lm-eval's own definitions of tasks, on the hub's data or on local files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from lit_prune.evaluation import task_data
from lit_prune.evaluation.harness import SEED, quiet

#: Where lm-eval keeps tasks that are asked for often: reading all of its folders takes long.
_FOLDERS = {
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "mmlu": "mmlu/default",
}

#: What a definition's functions and templates raise for a record without a field of theirs.
_MISFITS = (KeyError, TemplateError, AttributeError, TypeError, ValueError, IndexError, SyntaxError)


_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")


@dataclass
class Loaded:
    """A task or group as lm-eval has it, with its data.

    Attributes:
        tasks: The tasks, by name.
        groups: Groups of them that lm-eval aggregates.
        digest: Of the scored files, or None for hub data.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None


def manager_for(names: tuple[str, ...]) -> TaskManager:
    """lm-eval's index of tasks, of as little as there must be to find the names."""
    root = Path(next(iter(lm_eval_tasks.__path__)))
    known = {name: _FOLDERS.get("mmlu" if name.startswith("mmlu") else name) for name in names}
    folders = {root / folder for folder in known.values() if folder}
    if all(known.values()) and all(folder.is_dir() for folder in folders):
        small = _manager(tuple(sorted(map(str, folders))))
        if set(names) <= set(small.all_tasks):
            return small
    return _manager(())


@cache
def _manager(folders: tuple[str, ...]) -> TaskManager:
    with quiet():
        if folders:
            return TaskManager(include_defaults=False, include_path=list(folders))
        return TaskManager()


def members(manager: TaskManager, name: str) -> list[str]:
    """Names of the tasks that a name stands for: a task, a group or a tag."""
    entry: Any = manager.task_index[name]
    kind = entry.kind.name
    if kind in ("TASK", "PY_TASK"):
        return [name]
    parts: list[Any] = sorted(entry.tags) if kind == "TAG" else entry.cfg.get("task") or []
    parts = [
        part.get("group") or part.get("task") if isinstance(part, dict) else part for part in parts
    ]
    found = (members(manager, part) if part in manager.task_index else [part] for part in parts)
    return list(dict.fromkeys(task for names in found for task in names))


def aggregates(manager: TaskManager, name: str) -> bool:
    """Whether a name is that of a group for which lm-eval gives figures."""
    entry: Any = manager.task_index[name]
    return entry.kind.name == "GROUP" and bool(entry.cfg.get("aggregate_metric_list"))


def shots(definition: Mapping[str, Any], asked: int | None) -> int:
    """Examples before each item: as asked, but none where a definition says so; MMLU's are 5."""
    own = definition.get("num_fewshot")
    if own == 0 or (own is not None and asked is None):
        return own
    if asked is not None:
        return asked
    return 5 if definition.get("dataset_path") == "cais/mmlu" else 0


def load_hub(manager: TaskManager, name: str, asked: int | None) -> Loaded | str:
    """A task or group on the data that lm-eval takes from the hub.

    Args:
        manager: lm-eval's index.
        name: A task's or a group's name.
        asked: Examples before each item, or None for the default.

    Returns:
        The task, or why it can't be had.
    """
    try:
        with quiet():
            found: Any = manager.load([name])
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        return f"its data can't be had: {_line(error)}"
    for task in found["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            return "it runs code that the model writes; use lm-eval itself"
        if getattr(task, "MULTIMODAL", False):
            return "it needs more than text"
        own = {key: task.get_config(key) for key in ("num_fewshot", "dataset_path")}
        _set_shots(task, shots(own, asked))
    return Loaded(found["tasks"], found.get("groups") or {})


def load_local(
    manager: TaskManager, name: str, folder: str | Path, asked: int | None, limit: int | None
) -> Loaded | str:
    """A task or group on local files; see `lit_prune.evaluation.task_data.find_files`.

    Args:
        manager: lm-eval's index.
        name: A task's or a group's name.
        folder: Where its files are.
        asked: Examples before each item, or None for the default.
        limit: Items that are scored, or None for all.

    Returns:
        The task, or why it can't be run with these files.

    Raises:
        UserError: A file is damaged, or does not fit the task.
    """
    names = members(manager, name)
    found = {each: _load_file(manager, each, folder, asked, limit) for each in names}
    reasons = [f"{each}: {part}" for each, part in found.items() if isinstance(part, str)]
    if reasons and len(names) > 1:
        return f"{len(names) - len(reasons)} of its {len(names)} tasks can be run; {reasons[0]}"
    if reasons:
        return reasons[0].removeprefix(f"{name}: ")
    tasks: dict[str, Any] = {each: part[0] for each, part in found.items()}
    digest = task_data.digest([part[1] for part in found.values() if not isinstance(part, str)])
    if name in tasks:
        return Loaded(tasks, digest=digest)
    entry: Any = manager.task_index[name]
    parts = ("group", "aggregate_metric_list", "metadata")
    group = Group.from_config({part: entry.cfg[part] for part in parts if part in entry.cfg})
    for task in tasks.values():
        group.add(task)
    return Loaded(tasks, {name: group}, digest)


def _load_file(
    manager: TaskManager, name: str, folder: str | Path, asked: int | None, limit: int | None
) -> tuple[Any, Path] | str:
    """A task and the file that is scored, or why it can't be run."""
    entry: Any = manager.task_index.get(name)
    if entry is None:
        return "its group defines it in place"
    number = shots(entry.cfg, asked)
    files = task_data.find_files(folder, name, entry.cfg, number)
    if isinstance(files, str):
        return files
    records = {split: task_data.read_records(path) for split, path in files.paths.items()}
    task = _fitting(manager, name, files, records)
    _check(task, name, files.scored, islice(task.task_docs, limit))
    if number:
        examples = task.sampler.df
        if len(examples) < number:
            return f"{number}-shot needs {number} examples or more, got {len(examples)}"
        path = files.paths.get(files.fewshot or "")
        if path is not None:
            _check(task, name, path, examples)
    _set_shots(task, number)
    return task, files.scored


def _fitting(
    manager: TaskManager,
    name: str,
    files: task_data.TaskFiles,
    records: Mapping[str, list[task_data.Record]],
) -> Any:
    """A task on records that are raw, or went through the definition's process_docs before."""
    definition: Any = manager.task_index[name].cfg
    changes = task_data.overrides(definition, files, records)

    def build(changes: dict[str, Any]) -> Any:
        # a group in place is how lm-eval takes a definition with some entries of our own
        with quiet():
            group = {"group": "local", "task": [{"task": name, **changes}]}
            return manager.load(group)["tasks"][name]

    try:
        return build(changes)
    except _MISFITS:
        split, number, error = _first_misfit(build, definition, files, records)
    done = {**changes, "process_docs": None}
    others = [done, {**done, "doc_to_target": "gold"}] if definition.get("process_docs") else []
    for other in others if number == 1 else []:
        with suppress(*_MISFITS):
            return build(other)
    known = dict.fromkeys(field for record in records[split] for field in record)
    record = {**known, **records[split][number - 1]}
    needed = [] if definition.get("process_docs") else task_data.needed(definition)
    raise task_data.misfit(name, files.paths[split], number, record, error, needed) from error


def _first_misfit(
    build: Callable[[dict[str, Any]], Any],
    definition: Mapping[str, Any],
    files: task_data.TaskFiles,
    records: Mapping[str, list[task_data.Record]],
) -> tuple[str, int, Exception]:
    """The split and the number of the first record that a task can't be built on, and the error."""
    failed: dict[str, Exception] = {}

    def fails(split: str, number: int) -> bool:
        alone = {split: records[split][:number]}
        changes = task_data.overrides(definition, files, alone)
        splits = dict.fromkeys(("training_split", "validation_split", "fewshot_split"))
        try:
            build({**changes, **splits, "test_split": split})
        except _MISFITS as error:
            failed[split] = error
            return True
        return False

    for split, part in records.items():
        if fails(split, len(part)):
            number = task_data.first_failing(len(part), partial(fails, split))
            return split, number, failed[split]
    raise RuntimeError(f"expected a misfit in the files of {definition.get('task')}, got none")


def _check(task: Any, name: str, path: Path, items: Iterable[Any]) -> None:
    """Refuse records that lm-eval would score without a word: null fields, answers out of range."""
    needed = task_data.needed({part: task.get_config(part) for part in _TEMPLATES})
    for number, item in enumerate(items, 1):
        record = task_data.present(item)
        try:
            text, target = task.doc_to_text(record), task.doc_to_target(record)
            choices = None
            if task.get_config("doc_to_choice") is not None:
                choices = task.doc_to_choice(record)
        except _MISFITS as error:
            raise task_data.misfit(name, path, number, item, error, needed) from error
        answer = text if task.multiple_input else target
        if choices is None or isinstance(answer, list):
            continue
        known = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
        if not known:
            error = ValueError(
                f"its answer is {answer!r}, none of {len(choices)} choices; a split without "
                "answers can't be scored"
            )
            raise task_data.misfit(name, path, number, item, error, needed)


def _set_shots(task: Any, number: int) -> None:
    task.set_config(key="num_fewshot", value=number)
    task.set_fewshot_seed(seed=SEED)


def _line(error: BaseException) -> str:
    """The first line of an error."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
