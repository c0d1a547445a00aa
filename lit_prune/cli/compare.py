"""`lit-prune compare`: checkpoints and runs side by side."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lit_prune.console import stdout_console
from lit_prune.errors import UserError
from lit_prune.evaluation.cost import cost
from lit_prune.evaluation.record import (
    FILE,
    check_writable,
    fingerprint,
    read_record,
    with_ratios,
)
from lit_prune.evaluation.skeleton import skeleton
from lit_prune.reporting import compare as side_by_side
from lit_prune.reporting.card import public_name

_WIDTH = 160  # of a table where there is no terminal


def compare_models(
    models: list[str],
    *,
    format: Literal["table", "markdown", "json"] = "table",
    html: str | None = None,
) -> dict[str, Any]:
    """Put what is known of checkpoints and runs side by side; measures nothing.

    Args:
        models: Folders of runs or checkpoints, or files that lit-prune evaluate wrote.
        format: What is printed.
        html: Write a page with the table and plots to this file.

    Returns:
        Records by name, see `lit_prune.evaluation.record`.
    """
    names = _names(models)
    records = [(name, _record(model)) for name, model in zip(names, models, strict=True)]
    if html is not None:
        check_writable(Path(html).expanduser())
        from lit_prune.reporting.comparison_page import write_comparison

        write_comparison(records, Path(html).expanduser())
    if format == "json":
        print(json_text.dumps(dict(records), indent=2))
    else:
        print_comparison(records, format)
    return dict(records)


def print_comparison(
    records: Sequence[tuple[str, dict[str, Any]]], format: Literal["table", "markdown"] = "table"
) -> None:
    """Print models side by side.

    Args:
        records: Names and records.
        format: How.
    """
    columns = side_by_side.columns(records)
    names = [name for name, _ in columns]
    rows = side_by_side.rows([entry for _, entry in columns])
    notes = side_by_side.notes(records)
    if format == "markdown":
        print(side_by_side.markdown(names, rows))
        if notes:
            print("\n" + "\n".join(f"- note: {note}" for note in notes))
        return
    console = stdout_console(_WIDTH)
    console.print(side_by_side.render(names, rows))
    for note in notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _names(models: Sequence[str]) -> list[str]:
    """Last components of paths, as many as tell the models apart."""
    parts = [Path(model).expanduser().resolve().parts for model in models]
    for depth in range(1, max((len(each) for each in parts), default=1) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("expected different models, got one twice; name each once")


def _record(model: str) -> dict[str, Any]:
    path = Path(model).expanduser()
    if path.is_file():
        return read_record(path) if path.name != FILE else _current(path)
    if not path.is_dir():
        raise UserError(
            f"expected a folder of a run or checkpoint, or a file of lit-prune evaluate, got "
            f"{model}, which is not there"
        )
    places = [path, *([path.parent] if path.name == "pruned" else [])]
    for place in places:
        if (place / FILE).is_file():
            return _current(place / FILE)
    return _unmeasured(_checkpoint(path))


def _checkpoint(folder: Path) -> Path:
    """The checkpoint of a run's folder, or the folder itself."""
    return folder / "pruned" if (folder / "pruned/config.json").is_file() else folder


def _current(path: Path) -> dict[str, Any]:
    """A record in a run's or checkpoint's folder, unless its weights have changed since."""
    found = read_record(path)
    checkpoint = _checkpoint(path.parent)
    now = fingerprint(checkpoint)
    if now is None or found["model"].get("files") in (None, now):
        return found
    record = _unmeasured(checkpoint)
    text = f"{FILE} of {public_name(str(path.parent.resolve()))} is of other weights"
    record["warnings"].append(f"{text}: evaluate it again")
    return record


def _unmeasured(checkpoint: Path) -> dict[str, Any]:
    """A record of a model that was never evaluated: its cost, and what its fit reported."""
    report = checkpoint.parent / "report.json" if checkpoint.name == "pruned" else None
    structure, model = skeleton(str(checkpoint))
    entry: dict[str, Any] = {
        "source": public_name(str(checkpoint)),
        "digest": None,
        "cost": cost(model, structure, checkpoint=checkpoint),
        "perplexity": [],
        "tasks": None,
        "speed": None,
    }
    record = {"model": entry, "dense": None, "versions": {}, "warnings": []}
    if report is not None and report.is_file():
        _add_report(record, report)
    return record


def _add_report(record: dict[str, Any], path: Path) -> None:
    """Add the perplexities that a fit reported, of its result and of the dense model."""
    try:
        report = json_text.loads(path.read_text(encoding="utf-8"))
        protocol, models = report["protocol"], report["models"]
        final = models.get("recovered") or models.get("pruned")  # neither: nothing was cut
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected a report of a fit, got {path} ({error}); fit again") from error
    dense = models.get("dense")
    record["model"]["perplexity"] = [] if final is None else [_reported(final, protocol)]
    if dense is not None:
        sizes = {
            "parameters": dense["parameters"],
            "weight_bytes": dense["bytes"],
            "dtype": protocol.get("dtype"),
        }
        record["dense"] = {
            "source": f"dense of {path.parent.name}",
            "digest": None,
            "cost": {**sizes, "decoder_parameters": dense["decoder_parameters"]},
            "perplexity": [_reported(dense, protocol)],
        }
        with_ratios(record["model"], record["dense"])


def _reported(entry: dict[str, Any], protocol: dict[str, Any]) -> dict[str, Any]:
    keys = ("text", "split", "window", "tokens", "dtype")
    return {
        "value": entry["perplexity"],
        **{key: protocol.get(key) for key in keys},
        "stride": protocol.get("window"),
        "level": "token",
        "bos": False,
    }
