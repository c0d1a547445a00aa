"""Zero-shot and few-shot tasks, as lm-eval defines and scores them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_prune.errors import UserError

#: What "papers" stands for: the tasks of LLM-Pruner, FASP and others.
PAPERS = (
    "boolq",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)

_NORMED = ("hellaswag", "arc_challenge", "openbookqa")
_MIXED = {task: "acc_norm" if task in _NORMED else "acc" for task in PAPERS}
_ALL_NORMED = {task: "acc" if task in ("boolq", "winogrande") else "acc_norm" for task in PAPERS}

#: Name of an average -> metric of each of its tasks. The papers say "accuracy" only; which one it
#: is was told from their figures of the dense LLaMA-7B. `papers`: LLM-Pruner, from which coupled
#: components elimination and others take it. `fasp`: FASP, table 4. `tva_prune`: TVA-Prune, tables
#: 3 and 12. `mini_llm`: the four tasks of MINI-LLM.
AVERAGES: dict[str, dict[str, str]] = {
    "papers": _MIXED,
    "fasp": _ALL_NORMED,
    "tva_prune": dict.fromkeys(PAPERS[:-1], "acc"),
    "mini_llm": {task: _MIXED[task] for task in PAPERS[:4]},
}


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """Check names of tasks, and replace those that stand for several.

    Args:
        tasks: lm-eval's names of tasks or groups, or "papers".

    Returns:
        Names of tasks, and of groups for which lm-eval gives figures.

    Raises:
        UserError: A name is unknown, there is none, or the package is missing.
    """
    asked = [tasks] if isinstance(tasks, str) else list(tasks)
    flat = [name for each in asked for name in (PAPERS if each == "papers" else (each,))]
    if not flat:
        raise UserError("expected at least one task, got none; give 'papers' or names of lm-eval")
    manager = _loading().manager_for(tuple(flat))
    names: list[str] = []
    for name in flat:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, ["papers", *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `lm-eval ls tasks`"
            raise UserError(f"expected a task of lm-eval or 'papers', got '{name}': {hint}")
        whole = _loading().aggregates(manager, name)
        names += [name] if whole else _loading().members(manager, name)
    return list(dict.fromkeys(names))


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int = 8,
    progress: bool | str = True,
) -> dict[str, Any]:
    """Evaluate a model in memory on tasks of lm-eval.

    The model, random numbers and the tokenizer stay as they are; the same call gives the same
    result.

    Args:
        model: A causal language model of transformers, pruned or not.
        tokenizer: Its tokenizer.
        tasks: lm-eval's names of tasks or groups, or "papers" for those of the papers.
        data: A folder with jsonl files, see `lit_prune.evaluation.task_data.find_files`; None for
            the hub's data.
        limit: Only the first items of each task.
        fewshot: Examples before each item; None for the task's own number, which is 5 for MMLU.
        batch_size: Requests in a forward pass.
        progress: Whether to show a progress bar on stderr, or what it says besides the task.

    Returns:
        `protocol`, `tasks` and `averages` as plain types. A task's entry has its metrics with
        standard errors (`acc`, `acc_stderr`, `acc_norm` …, shares), `items`, `fewshot`, `version`
        (of lm-eval's definition), `digest` (of the local file), `truncated` (requests that were
        longer than the model's context); or `not_run`, the reason.

    Raises:
        UserError: A name is unknown, a file is damaged, the package is missing, or the model's
            log-likelihoods are NaN.
    """
    names = task_names(tasks)
    check_options(data, limit, fewshot, batch_size)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"expected a tokenizer of transformers for tasks, got {type(tokenizer).__name__}"
        )
    from lit_prune.evaluation import harness

    entries: dict[str, Any] = {}
    for name in names:
        text = f"{name} {progress}" if isinstance(progress, str) else name if progress else None
        with harness.own_numbers(model):  # loading draws some, too
            loaded = _load(name, data, fewshot, limit)
            if isinstance(loaded, str):
                entries[name] = {"not_run": loaded}
                continue
            results, truncated = harness.run(
                model,
                tokenizer,
                loaded.tasks,
                loaded.groups,
                limit=limit,
                batch_size=batch_size,
                progress=text,
            )
        entries[name] = {**_entry(results, name, loaded), "truncated": truncated}
    protocol = {
        "harness": f"lm-eval {harness.VERSION}",
        "limit": limit,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "data": "hub" if data is None else Path(data).resolve().name,
        "seed": harness.SEED,
    }
    return {"protocol": protocol, "tasks": entries, "averages": averages(entries)}


def averages(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over tasks.

    Args:
        entries: What was measured of each task, by name.

    Returns:
        `acc`, over the tasks that were run, and those of `AVERAGES`, each with `value`, `tasks`
        and, for the latter, `metrics`; or `not_run`, the reason.
    """
    run = [name for name, entry in entries.items() if "acc" in entry]
    found: dict[str, Any] = {"acc": {"not_run": "no task with acc was run"}}
    if run:
        found["acc"] = {"value": _mean([entries[name]["acc"] for name in run]), "tasks": run}
    for average, metrics in AVERAGES.items():
        missing = [task for task, metric in metrics.items() if metric not in entries.get(task, ())]
        if missing:
            found[average] = {"not_run": f"{', '.join(missing)} not run"}
            continue
        values = [entries[task][metric] for task, metric in metrics.items()]
        found[average] = {"value": _mean(values), "tasks": list(metrics), "metrics": metrics}
    return found


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join what `evaluate_tasks` gave for a task each.

    Args:
        parts: Results with the same protocol, at least one.
    """
    entries = {name: entry for part in parts for name, entry in part["tasks"].items()}
    return {"protocol": parts[0]["protocol"], "tasks": entries, "averages": averages(entries)}


def check_options(
    data: str | Path | None, limit: int | None, fewshot: int | None, batch_size: int
) -> None:
    """Refuse options of `evaluate_tasks` that can't be.

    Raises:
        UserError: There is no such folder, or a number is too small.
    """
    if data is not None and not Path(data).is_dir():
        raise UserError(f"expected a folder with jsonl files of tasks, got {data}, which is none")
    for name, value, least in (
        ("limit", limit, 1),
        ("fewshot", fewshot, 0),
        ("batch_size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"expected {name} of at least {least}, got {value}")


def _loading() -> Any:
    """What needs lm-eval, which is installed only if asked for."""
    try:
        from lit_prune.evaluation import task_loading
    except ImportError as error:
        raise UserError(
            f"expected the package lm-eval 0.4.13 or newer, got none or another ({error}): "
            "pip install 'lit-prune[eval]'"
        ) from error
    return task_loading


def _load(name: str, data: str | Path | None, fewshot: int | None, limit: int | None) -> Any:
    loading = _loading()
    manager = loading.manager_for((name,))
    if data is None:
        return loading.load_hub(manager, name, fewshot)
    return loading.load_local(manager, name, data, fewshot, limit)


def _entry(results: Mapping[str, Any], name: str, loaded: Any) -> dict[str, Any]:
    """lm-eval's figures of a task or group as plain types."""
    entry: dict[str, Any] = {}
    for key, value in results["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if comma:
            number = isinstance(value, (int, float))
            entry[metric if filtered == "none" else key] = float(value) if number else None
    shots = {results["n-shot"][task] for task in loaded.tasks}
    return {
        **entry,
        "items": sum(results["n-samples"][task]["effective"] for task in loaded.tasks),
        "fewshot": shots.pop() if len(shots) == 1 else None,
        "version": results["versions"].get(name),
        "digest": loaded.digest,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
