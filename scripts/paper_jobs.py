"""Rows of a table as runs on a model: their folders, configurations and commands."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from paper_tables import DENSE, Row, Table, tasks, texts

from lit_prune.cli.front import shipped_configs
from lit_prune.errors import UserError

#: Options that say how much goes in the place of a sparsity.
_INSTEAD = ("iterations", "per_layer_ratio")


@dataclass(frozen=True)
class Asked:
    """What the user wants of all rows.

    Attributes:
        out: Folder of all runs.
        model: A model in place of the paper's.
        data: Text of calibration in place of the paper's, and of recovery in the same fit.
        recovery_data: Text of recovery in a fit of its own in place of the paper's.
        text: Text of perplexity in place of the paper's.
        samples: Calibration windows in place of the paper's.
        tokens: Measure perplexity on so many tokens only.
        task_data: Folder of the tasks' data.
    """

    out: Path
    model: str | None = None
    data: str | None = None
    recovery_data: str | None = None
    text: str | None = None
    samples: int | None = None
    tokens: int | None = None
    task_data: str | None = None


@dataclass(frozen=True)
class Job:
    """A row to be run on a model.

    Attributes:
        table: Its table.
        row: The row.
        label: The model's name in the table.
        model: Hub id, folder or embedded name.
        own: Whether the model is one of the paper's.
        asked: What the user wants.
    """

    table: Table
    row: Row
    label: str
    model: str
    own: bool
    asked: Asked

    @property
    def folder(self) -> Path:
        """Of the run and its evaluation.json."""
        slug = re.sub(r"[^\w.-]+", "-", public(self.model)).strip("-")
        return self.asked.out / self.table.name / f"{self.row.name}-{slug}"

    @property
    def file(self) -> Path:
        """The configuration of the run."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def before(self) -> Job | None:
        """The run whose result this one trains on."""
        return replace(self, row=self.table.row(self.row.after)) if self.row.after else None

    @property
    def setup(self) -> dict[str, Any]:
        """How the row is run; empty for a dense model."""
        return {} if self.row.setup == DENSE else self.table.setups[str(self.row.setup)]

    @property
    def source(self) -> str:
        """What the row's fit starts from."""
        return str(self.before.folder / "pruned") if self.before else self.model


def public(model: str) -> str:
    """A model's name without prefix and folders."""
    bare = model.removeprefix("embedded:")
    return Path(bare).resolve().name if Path(bare).exists() else bare


def jobs(table: Table, asked: Asked, rows: Sequence[str] = ()) -> list[Job]:
    """What can be run for a table.

    Args:
        table: The table.
        asked: Names the model, else those of the paper are meant.
        rows: Only these, and what they train on.

    Returns:
        In the order of the rows.
    """
    models = {label: model for label, model in table.models.items() if model is not None}
    if asked.model is not None:
        ours = {label: model for label, model in models.items() if model == asked.model}
        models = ours or {public(asked.model): asked.model}
    chosen = {*rows, *(table.row(name).after for name in rows)} or {r.name for r in table.rows}
    return [
        Job(table, row, label, model, label in table.models, asked)
        for row in table.rows
        if row.setup is not None and row.name in chosen
        for label, model in models.items()
        if label not in table.models or _has(table, row, label)
    ]


def _has(table: Table, row: Row, label: str) -> bool:
    """Whether the paper reports on a model in a row, or in one that trains on it."""
    followers = [other for other in table.rows if other.after == row.name]
    return row.setup == DENSE or any(label in other.figures for other in (row, *followers))


def configuration(job: Job) -> dict[str, Any]:
    """Build the configuration of a row's fit.

    A setup has a shipped `config` and changes to it: `options` of the pruning callback, and `own`
    ones for the paper's models only; the sections `data`, `trainer` and `model`; `lora`;
    `distillation`, `prunes` and `recovery`, which are on unless they are false.

    Args:
        job: The row, not a dense one.

    Returns:
        It; `data.train` is None where the paper's text can't be loaded and no other is given.
    """
    setup = job.setup
    found = yaml.safe_load(shipped_configs()[setup["config"]].read_text(encoding="utf-8"))
    for section in ("data", "trainer", "model"):
        found[section] |= setup.get(section, {})
    text = job.asked.data if setup.get("prunes", True) else job.asked.recovery_data
    found["data"]["train"] = text or found["data"]["train"]
    callbacks = []
    for callback in found["trainer"]["callbacks"]:
        name, options = callback["class_path"].rpartition(".")[2], callback.get("init_args", {})
        if "sparsity" in options:
            options |= setup.get("options", {}) | (setup.get("own", {}) if job.own else {})
            if job.asked.samples is not None and "samples" in options:
                options["samples"] = job.asked.samples
            options["sparsity"] = job.row.sparsity
            if not setup.get("prunes", True):
                continue
        elif name == "LoRARecovery":
            options |= setup.get("lora", {})
        elif name == "GainLossReport" or (
            name == "Distillation" and not setup.get("distillation", True)
        ):
            continue  # `lit-prune evaluate` measures, once
        callbacks.append(callback)
    found["trainer"]["callbacks"] = callbacks
    return found


def pruner(config: dict[str, Any]) -> dict[str, Any]:
    """The pruning callback of a configuration; empty without one."""
    for callback in config["trainer"].get("callbacks") or []:
        if "sparsity" in (callback.get("init_args") or {}):
            return callback
    return {}


def fit_command(job: Job) -> list[str] | None:
    """Arguments of the row's fit; None for a dense model."""
    if job.row.setup == DENSE:
        return None
    options = pruner(configuration(job))
    command = ["fit", "--config", str(job.file), "--model.pretrained", job.source]
    if options and not any(options["init_args"].get(name) for name in _INSTEAD):
        command += ["--sparsity", f"{job.row.sparsity:g}"]
    if not job.setup.get("recovery", True):
        command.append("--no-recovery")
    return [*command, "--trainer.default_root_dir", str(job.folder)]


def asked_texts(job: Job) -> tuple[list[str], list[int]]:
    """Texts and windows that a row's perplexities are to be measured on."""
    named, windows = texts(job.table)
    if job.asked.text is not None and named:
        named = [job.asked.text]
    return named, windows or [2048]


def evaluate_command(job: Job) -> list[str]:
    """Arguments that measure the row."""
    named, windows = asked_texts(job)
    command = ["evaluate", job.model if job.row.setup == DENSE else str(job.folder)]
    command += ["--texts", json.dumps(named), "--windows", json.dumps(windows)]
    if job.asked.tokens is not None:
        command += ["--tokens", str(job.asked.tokens)]
    if tasks(job.table):
        command += ["--tasks", json.dumps(tasks(job.table))]
        if job.asked.task_data is not None:
            command += ["--task_data", job.asked.task_data]
    command += ["--dense", "none", "--speed", "false"]
    return [*command, "--out", str(job.folder / "evaluation.json")]


def commands(job: Job) -> list[list[str]]:
    """All that a new row needs, in order, beside the row that it trains on."""
    fit = fit_command(job)
    return [*([fit] if fit else []), evaluate_command(job)]


def write(job: Job) -> None:
    """Write the configuration that a row's command names.

    Raises:
        UserError: The folder can't be written, or there is no text to calibrate on.
    """
    if job.row.setup == DENSE:
        return
    found = configuration(job)
    if found["data"]["train"] is None:
        raise UserError(
            f"expected --data with a text for {job.row.name}, got none: the paper's can't be "
            "loaded from the hub; name a file, a folder or a data set"
        )
    text = yaml.safe_dump(found, sort_keys=False)
    if job.file.is_file() and job.file.read_text(encoding="utf-8") == text:
        return
    try:
        job.file.parent.mkdir(parents=True, exist_ok=True)
        job.file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"expected a folder that can be written as --out, got {job.asked.out} "
            f"({error.strerror}); choose another"
        ) from error
