"""Runs of a table's rows: what is there already, what it measured, and running what is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from paper_jobs import (
    Job,
    asked_texts,
    configuration,
    evaluate_command,
    fit_command,
    pruner,
    public,
    write,
)
from paper_tables import DENSE, Ours, read

from lit_prune.data.sources import source_name
from lit_prune.errors import UserError

State = Literal["complete", "pruned", "interrupted", "new"]
#: Runs `lit-prune` with arguments; returns the exit code and the last line of its errors.
Runner = Callable[[Sequence[str]], tuple[int, str]]


def state(job: Job) -> State:
    """What a row's folder has; it is complete if all that is asked for was measured."""
    entry = _entry(job)
    if entry is not None and misplaced(job) is None and _is_whole(job, entry):
        return "complete"
    if job.row.setup == DENSE:
        return "new"
    if (job.folder / "pruned" / "config.json").is_file():
        return "pruned"
    return "interrupted" if (job.folder / "config.yaml").exists() else "new"


def measured(job: Job) -> Ours | None:
    """What was measured for a row, with all differences from the paper's protocol.

    Returns:
        None where nothing was, or something else lies in its place (see `misplaced`).
    """
    entry = _entry(job)
    if entry is None or misplaced(job) is not None:
        return None
    ours = read(job.table, entry)
    at: Job | None = job
    while at is not None and at.row.setup != DENSE:
        ours.differs += _fit_differs(at)
        at = at.before
    return ours


def _is_whole(job: Job, entry: dict[str, Any]) -> bool:
    """Whether an entry has all that the row's `evaluate_command` would measure."""
    found = entry.get("perplexity") or []
    named, windows = asked_texts(job)
    if not all(
        any(_covers(each, source_name(text), window, job.asked.tokens) for each in found)
        for text in named
        for window in windows
    ):
        return False
    tasks = entry.get("tasks") or {}
    folder = job.asked.task_data
    data = "hub" if folder is None else Path(folder).resolve().name
    protocol = tasks.get("protocol", {})
    other = protocol.get("data", "hub") != data or protocol.get("limit") is not None
    pairs = zip(job.table.columns, read(job.table, entry).values, strict=True)
    return not any(
        ("task" in column and (value is None or other)) or ("cost" in column and value is None)
        for column, value in pairs
    )


def _covers(found: dict[str, Any], text: str, window: int, tokens: int | None) -> bool:
    """Whether a perplexity is of a text and window, and of as many tokens as are asked for."""
    if (found["text"], found["window"], found.get("stride", window)) != (text, window, window):
        return False
    counts = [n for n in (tokens, found.get("tokenizer_tokens_total")) if n is not None]
    return not counts or found["tokens"] > min(counts) - window


def misplaced(job: Job) -> str | None:
    """What of a row's folder is not this row's, if anything; such figures are not shown."""
    entry = _entry(job)
    if job.row.setup == DENSE:
        source = (entry or {}).get("source", "")
        other = entry is not None and public(source) not in (public(job.model), job.model)
        return f"{job.folder} has another model, {source}" if other else None
    saved, wanted = _saved(job), configuration(job)
    if saved is None:
        return None
    asked, got = pruner(wanted), pruner(saved)
    pairs: dict[str, tuple[Any, Any]] = {
        "method": (_class_name(asked), _class_name(got)),
        "model": (_tail(job.source), _tail(saved["model"]["pretrained"])),
    }
    for name, value in asked.get("init_args", {}).items():
        if name not in ("samples", "length"):
            pairs[name] = (value, got.get("init_args", {}).get(name))
    if job.setup.get("recovery", True):
        pairs["max_steps"] = (wanted["trainer"]["max_steps"], saved["trainer"]["max_steps"])
    wrong = [name for name, (one, other) in pairs.items() if one != other]
    return f"{job.folder} is a run with another {', '.join(wrong)}" if wrong else None


def _class_name(callback: dict[str, Any]) -> str:
    return str(callback.get("class_path")).rpartition(".")[2]


def _tail(path: str) -> tuple[str, ...]:
    return Path(path).parts[-2:]


def _entry(job: Job) -> dict[str, Any] | None:
    try:
        found = json.loads((job.folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    entry = found.get("model") if isinstance(found, dict) else None
    return entry if isinstance(entry, dict) else None


def _saved(job: Job) -> dict[str, Any] | None:
    try:
        return yaml.safe_load((job.folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None


def _fit_differs(job: Job) -> list[str]:
    """How a run's calibration differs from the setup's, by the configuration that it saved."""
    saved, setup = _saved(job), job.setup
    if saved is None:
        return ["its run's configuration is not there: options unchecked"]
    found, text = [], setup.get("data", {}).get("train")
    if saved["data"]["train"] != text:
        verb = "calibrated" if setup.get("prunes", True) else "trained"
        found.append(f"{verb} on {Path(saved['data']['train']).name}")
    wanted, got = setup.get("options", {}), pruner(saved).get("init_args", {})
    sizes = [(wanted.get(name), got.get(name)) for name in ("samples", "length")]
    if any(one is not None and one != other for one, other in sizes):
        found.append(f"calibrated with {got['samples']} windows of {got['length']} tokens")
    return found


def run(
    planned: Sequence[Job], runner: Runner | None = None, say: Callable[[str], None] = print
) -> dict[Path, str]:
    """Run what is missing, one row after the other; a row that fails stops no other.

    Args:
        planned: The rows.
        runner: Runs the command; by default in a process of its own.
        say: Is told what goes on.

    Returns:
        What went wrong, one line each, by the row's folder.
    """
    runner, failed = runner or run_process, {}
    for job in planned:
        name = job.folder.name
        try:
            wrong = misplaced(job)
            if wrong is not None:
                raise UserError(f"{wrong}: move it away")
            if job.before is not None and state(job.before) not in ("complete", "pruned"):
                raise UserError(f"{job.before.folder.name} must be run first")
            for command in remaining(job):
                say(f"{name}: lit-prune {command[0]}")
                code, line = runner(command)
                if code in (130, 143):
                    raise KeyboardInterrupt
                if code:
                    raise UserError(line or f"lit-prune {command[0]} ended with {code}")
        except UserError as error:
            failed[job.folder] = " ".join(str(error).split())
            say(f"{name}: {failed[job.folder]}")
    return failed


def remaining(job: Job) -> list[list[str]]:
    """What is left to be run for a row; an interrupted fit goes on."""
    now = state(job)
    if now == "complete":
        return []
    write(job)
    fit = fit_command(job)
    if now == "pruned" or fit is None:
        return [evaluate_command(job)]
    if now == "interrupted":
        fit += ["--ckpt_path", "last"]
    return [fit, evaluate_command(job)]


def run_process(arguments: Sequence[str]) -> tuple[int, str]:
    """Run `lit-prune` in a process of its own; its errors are passed on.

    Args:
        arguments: Of the command.

    Returns:
        The exit code, and the error's line without the program's name.
    """
    command, last = [sys.executable, "-m", "lit_prune", *arguments], ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            last = line.strip() or last
    return process.returncode, last.removeprefix("lit-prune: error: ")
