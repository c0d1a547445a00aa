"""report.html: the report as a page of one file, with plots, that asks nothing from outside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from lit_prune.reporting import plots
from lit_prune.reporting.card import public
from lit_prune.reporting.pages import fill, write
from lit_prune.reporting.report import (
    COLUMNS,
    MODELS,
    as_written,
    load_lines,
    number,
    protocol_line,
    sparsity_line,
    table_rows,
)

_TEMPLATE = "report.html.jinja"
#: Parts of a report that may have local paths in them.
_WITH_PATHS = ("pretrained", "config", "options", "protocol")
#: Curves that are drawn together: title, whether they are shares, and whether a metric is one.
_GROUPS: tuple[tuple[str, bool, Any], ...] = (
    ("Loss", False, lambda name: name.endswith("loss")),
    ("Sparsity", True, lambda name: name.endswith(("/sparsity", "/target"))),
    ("Multipliers λ", False, lambda name: "/lambda" in name),
)


def write_html(report: Mapping[str, Any], path: str | Path) -> None:
    """Write the page of a report; a report read from its file gives the same bytes.

    Args:
        report: The report; parts that it lacks are left out.
        path: The file; its folder exists or is made.
    """
    write(render(report), path)


def render(report: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        report: As for `write_html`.
    """
    written = as_written(report)
    # only where a path may stand: a text that a model wrote may begin like one
    paths = {name: public(written[name]) for name in _WITH_PATHS if name in written}
    return fill(_TEMPLATE, _content({**written, **paths}))


def _content(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows: texts, and numbers in the form in which they are shown."""
    findings = report.get("findings") or {}
    config = report.get("config")
    return {
        "model": report.get("pretrained") or "model",
        "method": report.get("method") or "none",
        "asked": _asked(report),
        "facts": _facts(report),
        "sparsity": sparsity_line(report),
        "table": _table(report),
        "protocol": protocol_line(report),
        "warnings": report.get("warnings") or [],
        "plots": [(title, Markup(svg)) for title, svg in _plots(report)],  # escaped where made
        "layers": _layers(report.get("layers") or {}),
        "tasks": task_tables(findings.get("tasks") or {}),
        "models": [m for m in MODELS if any(m in g for g in report.get("generations") or [])],
        "generations": report.get("generations") or [],
        "load": load_lines("pruned", stock=report.get("stock") is not False),
        "stock": report.get("stock") is not False,
        "config": None if config is None else yaml.safe_dump(config, sort_keys=False, width=76),
        "versions": report.get("versions") or {},
        "seed": report.get("seed"),
        "seconds": {
            name.replace("_", " "): f"{number(value, '{:,.1f}')} s"
            for name, value in (report.get("seconds") or {}).items()
        },
    }


def _asked(report: Mapping[str, Any]) -> dict[str, str]:
    """Model, method, sparsity and options, as text."""
    options = {
        str(name).replace("_", " "): _short(value)
        for name, value in (report.get("options") or {}).items()
    }
    target = report["sparsity"].get("target")
    asked = {"model": report.get("pretrained") or "-", "method": report.get("method") or "none"}
    return {**asked, **options, "sparsity": number(target, "{:.2%}")}


def _short(value: Any) -> str:
    """Plain types on a line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_short(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_short(part) for part in value) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _table(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """The result table with a column for each model, which suits narrow screens."""
    columns = [list(row) for row in table_rows(report)]
    return dict(zip(COLUMNS, map(list, zip(*columns, strict=True)), strict=True))


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What counts most: a label, a number, and what it is compared with."""
    models = report["models"]
    last = next((m for m in reversed(MODELS) if m in models and m != "dense"), None)
    if last is None or "dense" not in models:
        return []
    rows = dict(zip(MODELS, table_rows(report), strict=True))
    dense, final = (dict(zip(COLUMNS, rows[name], strict=True)) for name in ("dense", last))
    gone = number(report["sparsity"].get("decoder"), "{:.1%}")
    facts = [("decoder removed", gone, f"{number(_total(report), '{:.1%}')} of all")]
    for column, unit in (("perplexity", ""), ("checkpoint MB", " MB")):
        if final[column] != "-":
            label = column.removesuffix(" MB")
            facts.append((label, final[column] + unit, f"dense {dense[column]}{unit}"))
    return [*facts, *_speed(models["dense"], models[last])]


def _speed(dense: Mapping[str, Any], final: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Tokens/s; where rounds overlap, none is the faster one."""
    if final.get("tokens_per_second") is None:
        return []
    one, other = (entry.get("tokens_per_second_range") for entry in (dense, final))
    overlap = one and other and max(one[0], other[0]) <= min(one[1], other[1])
    compared = f"dense {number(dense.get('tokens_per_second'), '{:,.0f}')}"
    note = "; ranges overlap" if overlap else ""
    return [("tokens/s", number(final["tokens_per_second"], "{:,.0f}"), compared + note)]


def _total(report: Mapping[str, Any]) -> float | None:
    return report["sparsity"].get("total")


def _plots(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title and SVG of each plot that there is something to draw in."""
    found: list[tuple[str, str]] = []
    entries = report["models"].items()
    values = {m: e["perplexity"] for m, e in entries if e.get("perplexity") is not None}
    if len(values) > 1:
        found.append(("Perplexity", plots.perplexity_bars(values)))
    if svg := plots.width_heat_map(report.get("layers") or {}):
        found.append(("Kept width in each layer", svg))
    for axis, histogram in ((report.get("findings") or {}).get("scores") or {}).items():
        apart = f", {histogram['zeros']:,} of them 0 and not shown" if histogram["zeros"] else ""
        title = f"Scores of {axis}{apart}"
        found.append((title, plots.score_histogram(axis, histogram)))
    for title, percent, lines in _grouped(report.get("curves") or {}):
        found.append((title, plots.curves(title, title, lines, percent=percent)))
    return found


def _grouped(curves: Mapping[str, Any]) -> list[tuple[str, bool, dict[str, Any]]]:
    """Curves that belong into one plot: what is none of `_GROUPS` goes by the name before the /."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {
        (title, share): {name: line for name, line in curves.items() if is_one(name)}
        for title, share, is_one in _GROUPS
    }
    taken = {name for lines in groups.values() for name in lines}
    for name, line in curves.items():
        if name not in taken:
            title = f"Logged as {name.rpartition('/')[0]}/…" if "/" in name else "Logged"
            groups.setdefault((title, False), {})[name] = line
    return [
        (*key, drawn)
        for key, lines in groups.items()
        if (drawn := {n: line for n, line in lines.items() if _course(line)})
        and max(map(_course, drawn.values())) > 1  # a single point is a number, not a course
    ]


def _course(line: Any) -> int:
    """Points of a curve that are numbers."""
    return sum(value is not None for _, value in line)


def _layers(layers: Mapping[str, Any]) -> dict[str, Any]:
    """The table of widths: axes, and a row of `kept` or `kept of dense` for each layer."""
    axes = [axis for axis in layers if axis != "hidden"]
    number_of = max((len(layers[axis]["dense"]) for axis in axes), default=0)

    def cell(axis: str, layer: int) -> str:
        kept, dense = layers[axis]["kept"][layer], layers[axis]["dense"][layer]
        return f"{kept:,}" if kept == dense else f"{kept:,} of {dense:,}"

    rows = [[f"{layer}", *(cell(axis, layer) for axis in axes)] for layer in range(number_of)]
    return {"axes": axes, "rows": rows, "hidden": cell("hidden", 0) if "hidden" in layers else None}


def task_tables(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Task results side by side.

    Args:
        tasks: name of a model -> what `lit_prune.evaluation.tasks` gave for it.

    Returns:
        `models`, `rows` (task, measure, then a cell for each model), `not_run` (task -> reason)
        and `protocol`, a line.
    """
    rows: dict[tuple[str, str], dict[str, str]] = {}
    reasons: dict[str, str] = {}
    protocol: dict[str, Any] = {}
    for model, found in tasks.items():
        protocol |= found.get("protocol") or {}
        for task, result in (found.get("tasks") or {}).items():
            if "not_run" in result:
                reasons[task] = str(result["not_run"])
            for measure in ("acc", "acc_norm"):
                if measure in result:
                    error = result.get(f"{measure}_stderr")
                    cell = number(result[measure], "{:.4f}")
                    cell += "" if error is None else f" ±\N{NO-BREAK SPACE}{error:.4f}"
                    rows.setdefault((task, measure), {})[model] = cell
        for name, average in (found.get("averages") or {}).items():
            if "not_run" not in average:  # the tasks that it lacks are told where they are
                measure = f"{name} ({', '.join(average['tasks'])})"
                rows.setdefault(("average", measure), {})[model] = number(
                    average["value"], "{:.4f}"
                )
    names = list(tasks)
    return {
        "models": names,
        "rows": [[*key, *(cells.get(m, "-") for m in names)] for key, cells in rows.items()],
        "not_run": reasons,
        "protocol": ", ".join(f"{k.replace('_', ' ')}: {_short(v)}" for k, v in protocol.items()),
    }
