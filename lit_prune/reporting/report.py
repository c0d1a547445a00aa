"""What was gained and lost: report.json and the table at the end of a run."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_prune.evaluation.speed import median_speed
from lit_prune.files import file_written_at_once

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Report = dict[str, Any]
MODELS: tuple[str, ...] = ("dense", "pruned", "recovered")
COLUMNS: tuple[str, ...] = (
    "model",
    "perplexity",
    "x dense",
    "parameters",
    "checkpoint MB",
    "tokens/s",
)
NOT_RUN = "not run"
_PACKAGES = ("torch", "lightning", "transformers", "peft")


def model_entry(
    *,
    perplexity: float | None,
    parameters: int,
    decoder_parameters: int,
    weight_bytes: int,
    tokens_per_second: float | Sequence[float] | None = None,
) -> dict[str, Any]:
    """One model's part of the report.

    Args:
        perplexity: Perplexity of the protocol's text; None if not measured.
        parameters: All parameters, tied ones once.
        decoder_parameters: Those of the decoder layers.
        weight_bytes: Bytes of the checkpoint's weights.
        tokens_per_second: Speed; of several rounds the median is taken.

    Returns:
        The entry, plain types.
    """
    return {
        "perplexity": perplexity,
        "parameters": parameters,
        "decoder_parameters": decoder_parameters,
        "bytes": weight_bytes,
        **speed_entry(tokens_per_second),
    }


def speed_entry(tokens_per_second: float | Sequence[float] | None) -> dict[str, Any]:
    """The median and range of several rounds' speeds, as a model's entry has them.

    Args:
        tokens_per_second: Of each round, or a single number, which has no range.
    """
    speed = tokens_per_second
    if not isinstance(speed, Sequence):
        return {"tokens_per_second": speed, "tokens_per_second_range": None}
    if not speed:
        return speed_entry(None)
    return {
        "tokens_per_second": median_speed(speed),
        "tokens_per_second_range": [min(speed), max(speed)],
    }


def build_report(
    *,
    protocol: Mapping[str, Any],
    sparsity: Mapping[str, float],
    models: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float] | None = None,
    method: str = "",
    options: Mapping[str, Any] | None = None,
    warnings: Iterable[str] = (),
    details: Mapping[str, Any] | None = None,
) -> Report:
    """Put a report together; strict JSON can hold it.

    A number that is NaN or infinite becomes null, and a warning names it.

    Args:
        protocol: How perplexity was measured: text, window, tokens, dtype and more.
        sparsity: `target`, `decoder`, `total`, each removed / original parameters.
        models: `dense`, `pruned` and, if recovery ran, `recovered`: entries of `model_entry`.
        seconds: Time of each step.
        method: The pruning method's name.
        options: Its options.
        warnings: What a reader of the numbers should know.
        details: Further sections by name, such as `layers` and `curves`.

    Returns:
        The report as nested dicts of plain types.
    """
    parts = {
        "protocol": protocol,
        "method": method,
        "options": options or {},
        "sparsity": sparsity,
        "models": {name: models[name] for name in MODELS if name in models},
        "seconds": seconds or {},
        "versions": versions(),
        **(details or {}),
    }
    notes = list(warnings)
    report = {name: _plain(part, name, notes) for name, part in parts.items()}
    return report | {"warnings": notes}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, "lit_prune"):
        try:
            found[package] = version(package.replace("_", "-"))
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def write_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Write a report as strict JSON, under a temporary name and then moved.

    Args:
        report: The report; NaN and infinity are written as null and listed in its warnings.
        path: The file.
    """
    target = Path(path)
    text = json.dumps(as_written(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_written_at_once(target) as file:
        file.write_text(text, encoding="utf-8")


def as_written(report: Mapping[str, Any]) -> Report:
    """A report as a reader of its file gets it.

    Args:
        report: The report; what is NaN or infinite becomes None, with a warning.
    """
    notes = list(report.get("warnings", ()))
    plain = {key: _plain(part, key, notes) for key, part in report.items()}
    return plain | {"warnings": notes}


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of the result table, a row for each of dense, pruned, recovered; see `COLUMNS`."""
    models = report["models"]
    dense = models.get("dense", {}).get("perplexity")
    rows = []
    for name in MODELS:
        entry = models.get(name)
        if entry is None:
            rows.append((name, NOT_RUN, *["-"] * (len(COLUMNS) - 2)))
            continue
        value, speed, size = entry["perplexity"], entry["tokens_per_second"], entry["bytes"]
        ratio = None if value is None or not dense else value / dense
        rows.append(
            (
                name,
                number(value, "{:,.2f}"),
                number(ratio, "{:.3f}"),
                number(entry["parameters"], "{:,}"),
                number(None if size is None else size / 1e6, "{:,.1f}"),
                number(speed, "{:,.0f}") + _span(entry.get("tokens_per_second_range")),
            )
        )
    return rows


def _span(ends: Sequence[float] | None) -> str:
    return "" if not ends else f" ({number(ends[0], '{:,.0f}')}-{number(ends[1], '{:,.0f}')})"


def protocol_line(report: Mapping[str, Any]) -> str:
    """One line that says how the perplexities were measured."""
    protocol = dict(report["protocol"])
    parts = [f"perplexity on {protocol.pop('text', 'the validation text')}"]
    if tokens := protocol.pop("tokens", None):
        parts.append(f"{tokens:,} tokens")
    if window := protocol.pop("window", None):
        parts.append(f"windows of {window:,}")
    if dtype := protocol.pop("dtype", None):
        parts.append(str(dtype).removeprefix("torch."))
    parts += [f"{name.replace('_', ' ')}: {value}" for name, value in protocol.items()]
    return ", ".join(parts)


def sparsity_line(report: Mapping[str, Any]) -> str:
    """One line with the target and the realised share of removed parameters."""
    sparsity = report["sparsity"]
    target, decoder, total = (
        number(sparsity.get(key), "{:.2%}") for key in ("target", "decoder", "total")
    )
    return f"removed {decoder} of the decoder's parameters (target {target}), {total} of all"


def load_lines(directory: str | Path, *, stock: bool = True) -> str:
    """Python that loads a checkpoint in plain transformers: the import and two lines.

    Args:
        directory: The checkpoint's folder or hub name.
        stock: False if it needs the modelling file it carries.

    Returns:
        Three lines that run as they are.
    """
    name = json.dumps(str(directory), ensure_ascii=False)
    # without it the tokenizer, which reads config.json too, stops at a question
    arguments = name if stock else f"{name}, trust_remote_code=True"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})"
    )


def render_table(report: Mapping[str, Any]) -> Table:
    """The result table: dense, pruned, recovered x perplexity, parameters, size and speed."""
    from rich.table import Table

    table = Table(title=report.get("method") or None)
    for index, column in enumerate(COLUMNS):
        # narrow terminals wrap headers, but no numbers
        whole = column in ("parameters", "tokens/s")
        table.add_column(column, justify="right" if index else "left", no_wrap=whole)
    for row in table_rows(report):
        table.add_row(*(cell.replace(" (", "\n(") for cell in row))
    return table


def print_report(
    report: Mapping[str, Any],
    out_dir: str | Path,
    *,
    stock: bool = True,
    page: str | Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the table, how it was measured, and how to load the result.

    Args:
        report: The report.
        out_dir: The run's folder; the checkpoint is its `pruned/`.
        stock: False if the checkpoint needs the modelling file it carries.
        page: Where the same is to be read with plots.
        console: Where to print; stdout by default.
    """
    from lit_prune.console import stdout_console

    console = console or stdout_console()
    console.print(render_table(report))
    lines = [protocol_line(report), sparsity_line(report)]
    if seconds := report.get("seconds"):
        parts = (f"{name.replace('_', ' ')} {number(s, '{:.1f}')} s" for name, s in seconds.items())
        lines.append("time: " + ", ".join(parts))
    lines += [f"note: {note}" for note in report.get("warnings", ())]
    lines += [] if page is None else [f"report: {page}"]
    lines += ["", "load it in plain transformers:"]
    lines += [load_lines(Path(out_dir) / "pruned", stock=stock)]
    for line in lines:  # soft_wrap: a path that is broken in two can't be copied
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def number(value: float | None, form: str) -> str:
    """A cell; a number that is missing or not finite is a dash."""
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def _plain(value: Any, name: str, notes: list[str]) -> Any:
    """Plain JSON types; NaN and infinity become None and a note."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part, f"{name}.{key}", notes) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(part, f"{name}[{index}]", notes) for index, part in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # a tensor's or numpy's scalar
        return _plain(value.item(), name, notes)
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        notes.append(f"{name} is {value}, not a finite number; it is left out")
        return None
    return str(value)
