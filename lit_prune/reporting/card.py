"""The model card of an exported checkpoint: what was done and what was measured, nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_prune.reporting.report import COLUMNS, protocol_line, sparsity_line, table_rows, versions

#: What steps of a lineage say for programs only.
_FOR_PROGRAMS = ("base_local", "base_digest")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LOCAL = re.compile(r"^(?:/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\)|^file:")


def model_card(
    report: Mapping[str, Any] | None,
    lineage: Sequence[Mapping[str, Any]],
    base: str,
    method: Mapping[str, Any],
    load_lines: str,
    stock: bool,
    *,
    license: str | None = None,
) -> str:
    """README.md of a pruned checkpoint, with the YAML header that the Hugging Face hub reads.

    Local paths are shown by their last component. A base that isn't a hub name stays out of the
    header, where it would point to another model; the nearest hub name of the lineage stands there.

    Args:
        report: The report (see `lit_prune.reporting.report`); None if nothing was measured.
        lineage: Earlier prunings, oldest first: plain dicts, such as base, method, sparsity.
        base: What was pruned: hub name, folder, file, or `embedded:` name.
        method: `name`, `options` (a dict), `lora` (whether recovery was that), and `widths`: axis
            -> {"dense": units per layer before, "kept": units per layer now}, each a number or a
            list with one per layer.
        load_lines: Python that loads the checkpoint (`lit_prune.reporting.report.load_lines`).
        stock: Whether the architecture's stock class holds it.
        license: The base model's license identifier, passed through.

    Returns:
        The text.
    """
    name = public_name(base)
    parts = [
        _header([base, *(str(step.get("base", "")) for step in reversed(lineage))], license),
        f"# {Path(name).stem if name.endswith('.gguf') else name.split('/')[-1]}, pruned",
        f"`{name}` made smaller with structured pruning by lit-prune.",
        _what_was_done(report, method),
        _results(report),
        _loading(load_lines, stock),
        _history(lineage),
        _versions(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_name(source: str) -> str:
    """A model's or file's name without the folders of this machine.

    Args:
        source: Hub name, path, or `embedded:` name.

    Returns:
        The last component of a path; any other name as it is.
    """
    if not _is_local(source):
        return source
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1] or "local model"


def _is_local(source: str) -> bool:
    """Whether a model source is a path: by its form, or because it is there."""
    if _LOCAL.match(source):
        return True
    if source.startswith("embedded:"):
        return False
    is_path = re.search(r"[/\\]", source) is not None and not _HUB_ID.fullmatch(source)
    return is_path or _exists(source)


def _exists(source: str) -> bool:
    """Whether a file or folder of this name is there."""
    try:
        return Path(source).exists()
    except OSError:
        return False


def _header(bases: Sequence[str], license: str | None) -> str:
    """The YAML front matter; of the bases, nearest first, it names the first that is on the hub."""
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    hub = [base for base in bases if _HUB_ID.fullmatch(base) and not _is_local(base)]
    if hub:
        fields["base_model"] = hub[0]
    if license:
        fields["license"] = license
    fields["tags"] = ["pruned", "lit-prune"]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _what_was_done(report: Mapping[str, Any] | None, method: Mapping[str, Any]) -> str:
    """Method, sparsity, widths, options."""
    lines = [f"- Method: {method.get('name', 'unknown')}"]
    if report:
        lines.append(f"- Sparsity: {sparsity_line(report)}")
        if "recovered" in report["models"]:
            lora = method.get("lora")
            how = "LoRA, merged into the weights" if lora else "training without adapters"
            lines.append(f"- Recovery: {how}")
    for axis, width in (method.get("widths") or {}).items():
        lines.append(f"- {_clean(axis)}: {_width(width)}")
    if options := method.get("options"):
        lines.append(f"- Options: {_inline(options)}")
    return "\n".join(["## What was done", "", *lines])


def _width(width: Any) -> str:
    """`1,152 of 1,536 in each of 30 layers`, or the range where layers differ."""
    if not isinstance(width, Mapping):
        return f"{_range(width)}"
    text = f"{_range(width['kept'])} of {_range(width['dense'])}"
    kept = width["kept"]
    if not isinstance(kept, Sequence):
        return text
    if len(set(kept)) == 1:
        return f"{text} in each of {len(kept)} layers"
    return f"{text} in {len(kept)} layers (mean {sum(kept) / len(kept):,.1f})"


def _range(counts: Any) -> str:
    """A count, or the least and the most of several."""
    if not isinstance(counts, Sequence) or isinstance(counts, str):
        return f"{counts:,}" if isinstance(counts, int) else str(counts)
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _results(report: Mapping[str, Any] | None) -> str:
    """The table and how it was measured."""
    if not report:
        return "## Results\n\nNot measured."
    rows = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1)), *table_rows(report)]
    lines = ["## Results", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines.append(f"Protocol: {_clean(protocol_line(public(report)))}.")
    if notes := report.get("warnings"):
        lines += ["", *(f"- Note: {_clean(note)}" for note in notes)]
    return "\n".join(lines)


def _loading(load_lines: str, stock: bool) -> str:
    """How to load it."""
    if stock:
        text = "A stock checkpoint: it loads in transformers without further code."
    else:
        text = (
            "The stock class can't express these widths, so the checkpoint carries a modelling "
            "file: load it with `trust_remote_code=True`, or without remote code through "
            "`lit_prune.load_pruned`."
        )
    return f"## How to load\n\n{text}\n\n```python\n{_without_paths(load_lines.strip())}\n```"


def _history(lineage: Sequence[Mapping[str, Any]]) -> str:
    """Earlier prunings, oldest first."""
    if not lineage:
        return ""
    lines = []
    for number, entry in enumerate(lineage, start=1):
        named = {"base": public_name(str(entry["base"]))} if "base" in entry else {}
        told = {key: part for key, part in entry.items() if key not in _FOR_PROGRAMS}
        lines.append(f"{number}. {_inline({**told, **named})}")
    return "\n".join(["## Earlier prunings of this model", "", *lines])


def _versions(report: Mapping[str, Any] | None) -> str:
    """Versions the result was made with."""
    found = (report or {}).get("versions") or versions()
    return "## Versions\n\n" + ", ".join(f"{name} {number}" for name, number in found.items())


def public(value: Any) -> Any:
    """Nested plain types with local paths cut to their last component.

    Args:
        value: Mappings, lists, strings and other scalars.
    """
    if isinstance(value, Mapping):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(part) for part in value]
    if isinstance(value, Path):
        return value.name
    return public_name(value) if isinstance(value, str) and _LOCAL.match(value) else value


def _inline(value: Any) -> str:
    """Nested plain types on one line."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{_clean(key)} ({_inline(part)})"
            if isinstance(part, Mapping)
            else f"{_clean(key)} {_inline(part)}"
            for key, part in value.items()
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_inline(part) for part in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _clean(public(value))


def _clean(value: Any) -> str:
    """One line without local paths."""
    return _without_paths(" ".join(str(value).split()))


def _without_paths(text: str) -> str:
    """Absolute paths inside a text cut to their last component."""
    return re.sub(r"(?<![\w.:/])(?:/[\w.@+-]+){2,}/?", lambda found: public_name(found[0]), text)
