"""A comparison as a page of one file, with plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_prune.reporting import plots
from lit_prune.reporting.compare import Entry, columns, perplexity_label, rows
from lit_prune.reporting.pages import fill, write

Named = Sequence[tuple[str, Entry]]


def write_comparison(records: Sequence[tuple[str, Mapping[str, Any]]], path: str | Path) -> None:
    """Write models side by side.

    Args:
        records: Names and records, see `lit_prune.evaluation.record`.
        path: The file.
    """
    named = columns(records)
    sections: dict[str, list[Any]] = {}
    for row in rows([entry for _, entry in named]):
        sections.setdefault(row.section, []).append(row)
    drawn = [
        ("Perplexity against parameters", sizes_plot(named)),
        ("Latency of the prompt against widths", widths_plot(named, "prefill")),
        ("Latency of a new token against widths", widths_plot(named, "decode")),
    ]
    content = {
        "names": [name for name, _ in named],
        "sections": sections,
        "warnings": list(dict.fromkeys(note for _, r in records for note in r["warnings"])),
        "plots": [(title, Markup(svg)) for title, svg in drawn if svg],  # escaped where made
    }
    write(fill("comparison.html.jinja", content), path)


def sizes_plot(named: Named) -> str | None:
    """Perplexity of each protocol against parameters.

    Args:
        named: Names and entries of models.

    Returns:
        SVG, or None where no two models can be compared.
    """
    points = [
        {
            "name": name,
            "parameters": entry["cost"]["parameters"],
            "perplexity": each["value"],
            "protocol": perplexity_label(each),
        }
        for name, entry in named
        for each in entry["perplexity"]
        if each["value"] is not None
    ]
    return plots.perplexity_against_parameters(points) if len(points) > 1 else None


def widths_plot(named: Named, part: str) -> str | None:
    """Latency against the power of two that divides the FFN widths of all layers.

    Args:
        named: Names and entries of models.
        part: ``prefill`` or ``decode``.

    Returns:
        SVG, or None where fewer than two models were timed.
    """
    points, timed = [], 0
    for _, entry in named:
        widths = (entry["cost"].get("widths") or {}).get("channel")
        batches = (entry.get("speed") or {}).get("batches") or {}
        found = {size: batch[part] for size, batch in batches.items() if part in batch}
        if not widths or not found:
            continue
        timed += 1
        for size, figures in found.items():
            stat = figures["latency_ms"]
            points.append(
                {
                    "name": f"batch {size}",
                    "multiple": power_of_two(widths),
                    "latency_ms": stat["median"],
                    "low": stat["low"],
                    "high": stat["high"],
                }
            )
    return plots.latency_against_multiple(points) if timed > 1 else None


def power_of_two(widths: Sequence[int]) -> int:
    """The largest power of two that divides all widths."""
    common = math.gcd(*widths)
    return common & -common if common else 1
