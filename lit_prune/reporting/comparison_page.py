"""A comparison as a page of one file, with plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lit_prune.evaluation.texts import protocol
from lit_prune.reporting import plots
from lit_prune.reporting.compare import columns, notes, rows
from lit_prune.reporting.compare_rows import (
    Entry,
    Key,
    perplexity_labels,
    speeds_of,
)
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
        "warnings": notes(records),
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
    labels = perplexity_labels(entry for _, entry in named)
    points = [
        {
            "name": name,
            "parameters": entry["cost"]["parameters"],
            "perplexity": each["value"],
            "protocol": labels[protocol(dict(each))],
        }
        for name, entry in named
        for each in entry["perplexity"]
        if each["value"] is not None
    ]
    return plots.perplexity_against_parameters(points) if len(points) > 1 else None


def widths_plot(named: Named, part: str) -> str | None:
    """Latency against the power of two that divides the FFN widths of all layers.

    Each protocol that at least two models were timed by has lines of its own.

    Args:
        named: Names and entries of models.
        part: ``prefill`` or ``decode``.

    Returns:
        SVG, or None where fewer than two models were timed alike.
    """
    timed: dict[Key, list[tuple[int, Mapping[str, Any]]]] = {}
    for _, entry in named:
        widths = (entry["cost"].get("widths") or {}).get("channel")
        if not widths:
            continue
        for key, speed in speeds_of(entry).items():
            found = {size: each[part] for size, each in speed["batches"].items() if part in each}
            if found:
                timed.setdefault(key, []).append((power_of_two(widths), found))
    alike = {key: models for key, models in timed.items() if len(models) > 1}
    labels = _differences(list(alike))
    points = [
        {
            "name": ", ".join(filter(None, (f"batch {size}", labels[key]))),
            "multiple": multiple,
            "latency_ms": figures["latency_ms"]["median"],
            "low": figures["latency_ms"]["low"],
            "high": figures["latency_ms"]["high"],
        }
        for key, models in alike.items()
        for multiple, found in models
        for size, figures in found.items()
    ]
    return plots.latency_against_multiple(points) if points else None


def _differences(protocols: Sequence[Key]) -> dict[Key, str]:
    """What of protocols, names and values, is not the same in all."""
    shared = set(protocols[0]).intersection(*protocols) if protocols else set()
    parts = {key: [each for each in key if each not in shared] for key in protocols}
    return {key: ", ".join(f"{name} {value}" for name, value in parts[key]) for key in protocols}


def power_of_two(widths: Sequence[int]) -> int:
    """The largest power of two that divides all widths."""
    common = math.gcd(*widths)
    return common & -common if common else 1
