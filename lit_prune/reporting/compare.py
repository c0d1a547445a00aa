"""Models side by side: a row for each figure and its protocol, a column for each model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_prune.evaluation.texts import protocol
from lit_prune.reporting.compare_rows import (
    NOTHING,
    Entry,
    Row,
    perplexities,
    sizes,
    sources,
    speeds,
    speeds_of,
    union,
)
from lit_prune.reporting.compare_tasks import tasks

if TYPE_CHECKING:
    from rich.table import Table


def columns(records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Entry]]:
    """Names and entries of all models, a dense one that several were compared with once.

    Such a one has the perplexities of all records, and its later entries under `also`.

    Args:
        records: Names and records, see `lit_prune.evaluation.record`.
    """
    found: list[tuple[str, Entry]] = []
    places: dict[Any, int] = {}
    for name, record in records:
        dense = record["dense"]
        if dense is not None:
            weights = dense.get("files") or dense.get("digest")  # files: whatever the dtype
            # without either nobody knows whether two are the same
            key = (dense["source"], weights) if weights else object()
            if key in places:
                place = places[key]
                found[place] = (dense["source"], _joined(found[place][1], dense))
            else:
                places[key] = len(found)
                found.append((dense["source"], dense))
        found.append((name, record["model"]))
    return found


def _joined(first: Entry, other: Entry) -> Entry:
    known = {protocol(dict(each)) for each in first["perplexity"]}
    more = [each for each in other["perplexity"] if protocol(dict(each)) not in known]
    return {
        **first,
        "perplexity": [*first["perplexity"], *more],
        "also": [*first.get("also", ()), other],
    }


def rows(entries: Sequence[Entry]) -> list[Row]:
    """The rows of a comparison; a figure that a model has not is a dash.

    Figures of different protocols are in different rows.

    Args:
        entries: One for each column, see `columns`.
    """
    found = [*sizes(entries), *perplexities(entries), *tasks(entries), *speeds(entries)]
    return [row for row in found if any(cell != NOTHING for cell in row.cells)]


def notes(records: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What a reader of the figures should know: warnings, and why something was not run.

    Args:
        records: Names and records, see `lit_prune.evaluation.record`.
    """
    found = [note for _, record in records for note in record["warnings"]]
    named = columns(records)
    timed = [(it, entry) for _, entry in named for it in sources(entry) if it.get("speed")]
    if any(each["speed"] not in speeds_of(entry).values() for each, entry in timed):
        found.append(
            "a dense model was timed several times: its column has the first figures, and each "
            "ratio is to the dense model of the same session"
        )
    reasons: dict[str, list[str]] = {}
    for name, entry in named:
        for reason in union(map(_not_run, sources(entry))):
            reasons.setdefault(reason, []).append(name)
    found += [f"not run with {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return list(dict.fromkeys(found))


def _not_run(entry: Entry) -> list[str]:
    """What of a model was not run, and why."""
    results = (entry.get("tasks") or {}).get("tasks", {})
    batches = (entry.get("speed") or {}).get("batches", {})
    memory = (entry.get("speed") or {}).get("memory") or {}
    parts = [*results.items(), *((f"batch {size}", each) for size, each in batches.items())]
    parts.append(("peak memory", memory))
    return [f"{name} ({each['not_run']})" for name, each in parts if "not_run" in each]


def render(names: Sequence[str], found: Sequence[Row]) -> Table:
    """A table for the terminal.

    Args:
        names: Of the models.
        found: What `rows` gave.
    """
    from rich.table import Table
    from rich.text import Text  # a name may look like markup

    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    section = None
    for row in found:
        if row.section != section:
            if section is not None:
                table.add_section()
            section = row.section
            table.add_row(Text(section, style="bold"))
        table.add_row(Text(row.label), *map(Text, row.cells))
    return table


def markdown(names: Sequence[str], found: Sequence[Row]) -> str:
    """The same as Markdown.

    Args:
        names: Of the models.
        found: What `rows` gave.
    """
    lines = [("", *names), ("---", *["---:"] * len(names))]
    lines += [(f"{row.section}: {row.label}", *row.cells) for row in found]
    return "\n".join("| " + " | ".join(_escaped(cells)) + " |" for cells in lines)


def _escaped(cells: Iterable[str]) -> list[str]:
    # a line break would end the row
    return [cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells]
