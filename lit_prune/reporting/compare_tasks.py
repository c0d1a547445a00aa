"""The rows of a comparison that are about tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lit_prune.reporting.compare_rows import (
    NOTHING,
    Entry,
    Key,
    Row,
    asked_of,
    sources,
    told_apart,
    union,
)

#: By what must be the same for a comparison: a label and a result.
Results = dict[Key, tuple[str, Mapping[str, Any]]]


def tasks(entries: Sequence[Entry]) -> list[Row]:
    """A row for each task, of the same items and shots, and for each average of the same tasks.

    Args:
        entries: One for each column.
    """
    measured = [[it["tasks"] for it in sources(entry) if it.get("tasks")] for entry in entries]
    found = []
    for wanted in union(map(asked_of, each) for each in measured):
        mine = [[one for one in each if asked_of(one) == wanted] for each in measured]
        section = "tasks: " + ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in wanted if value is not None
        )
        found += _task_rows(section, [_by_key(each, _task_results) for each in mine])
        found += _task_rows(section, [_by_key(each, _averages) for each in mine])
    return found


def _by_key(
    measured: Iterable[Mapping[str, Any]], results: Callable[[Mapping[str, Any]], Results]
) -> Results:
    found: Results = {}
    for each in measured:
        for key, result in results(each).items():
            found.setdefault(key, result)
    return found


def _task_rows(section: str, columns: Sequence[Results]) -> list[Row]:
    """Rows of what was measured; what was not run stands in those of the same name."""
    labels: dict[Key, str] = {}
    for results in columns:
        labels |= {key: label for key, (label, _) in results.items()}
    run = {key[:1] for key in labels if len(key) > 1}
    shown = told_apart({key: label for key, label in labels.items() if key not in run})
    return [
        Row(section, label, [_task(found.get(key) or found.get(key[:1])) for found in columns])
        for key, label in shown.items()
    ]


def _task_key(name: str, result: Mapping[str, Any]) -> Key:
    """Name and what figures must share to be compared; the name alone of what was not run."""
    if "not_run" in result:
        return (name,)
    return (name, *(result.get(part) for part in ("fewshot", "version", "digest", "items")))


def _task_results(measured: Mapping[str, Any]) -> Results:
    found: Results = {}
    for name, result in measured["tasks"].items():
        shots, items = result.get("fewshot"), result.get("items")
        label = name + ("" if shots is None else f", {shots}-shot")
        label += "" if items is None else f", {items:,} items"
        found[_task_key(name, result)] = (label, result)
    return found


def _averages(measured: Mapping[str, Any]) -> Results:
    found: Results = {}
    for name, average in measured.get("averages", {}).items():
        members, metrics = average.get("tasks"), average.get("metrics") or {}
        if members is None:  # the tasks that it lacks are told where they are
            continue
        keys = [(_task_key(t, measured["tasks"].get(t, {})), metrics.get(t)) for t in members]
        shots = {measured["tasks"].get(task, {}).get("fewshot") for task in members}
        label = f"average, {name} ({', '.join(members)})"
        if len(shots) == 1 and shots != {None}:
            label += f", {shots.pop()}-shot"
        found[(f"average {name}", *keys)] = (label, average)
    return found


def _task(found: tuple[str, Mapping[str, Any]] | None) -> str:
    if found is None:
        return NOTHING
    result = found[1]
    if "not_run" in result:
        return "not run"
    if "value" in result:
        return f"{result['value']:.4f}"
    parts = [
        f"{name} {result[name]:.4f} ± {result[f'{name}_stderr']:.4f}"
        for name in ("acc", "acc_norm")
        if result.get(name) is not None and result.get(f"{name}_stderr") is not None
    ]
    return "\n".join(parts) or NOTHING
