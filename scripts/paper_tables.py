"""Tables of the papers: what they hold, and what a finished run has to put beside them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "tables"
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """A method at a sparsity.

    Attributes:
        name: Of the row, and of its runs' folders.
        method: As the table calls it.
        sparsity: Share removed, as the paper counts it.
        setup: Key of the table's setups, ``dense`` for a model as it is, None for what lit-prune
            can't do.
        figures: The paper's, in the order of the columns, by its model's name; None where it has
            none.
        after: Row whose result this one trains on.
        unsure: Whether something about the row could not be read with certainty.
    """

    name: str
    method: str
    sparsity: float
    setup: str | None
    figures: dict[str, list[float | None]]
    after: str | None = None
    unsure: bool = False


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        name: Short name, such as fasp-2.
        paper: The paper's title.
        number: The paper's number of the table, if it is known.
        caption: What it shows.
        protocol: How the paper measured: calibration, recovery, evaluation, axes, notes.
        columns: `title` and what is measured: `perplexity` and `window`; `task` and `metric`;
            `average` of the tasks; `cost` in some `unit`; `paper_only` for what is not.
        models: Where the paper's models are on the hub; None for a family that lit-prune has not.
        setups: Configuration, options and data of the rows, see `paper_jobs.configuration`.
        rows: In the paper's order.
    """

    name: str
    paper: str
    number: int | None
    caption: str
    protocol: dict[str, Any]
    columns: list[dict[str, Any]]
    models: dict[str, str | None]
    setups: dict[str, dict[str, Any]]
    rows: list[Row]

    def row(self, name: str) -> Row:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def title(self) -> str:
        """The paper's title and the table's number."""
        number = "" if self.number is None else f", table {self.number}"
        return f"{self.paper}{number}"


@dataclass
class Ours:
    """What a run has to say about a row.

    Attributes:
        values: In the order of the columns; None for what was not run, NaN for a perplexity that
            is not finite.
        differs: How its protocol differs from the paper's.
    """

    values: list[float | None]
    differs: list[str] = field(default_factory=list)


def names() -> list[str]:
    """Names of all tables; those with a number by it."""
    parts = [path.stem.split("-", 1) for path in FOLDER.glob("*.json")]
    parts.sort(key=lambda part: (part[0], int(part[1]) if part[1].isdigit() else 0, part[1]))
    return ["-".join(part) for part in parts]


def load(name: str) -> Table:
    """Read a table."""
    found = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    rows = [Row(name=row.pop("row"), **row) for row in found["rows"]]
    return Table(
        name=found["table"],
        rows=rows,
        **{key: value for key, value in found.items() if key not in ("table", "rows")},
    )


def texts(table: Table) -> tuple[list[str], list[int]]:
    """Texts and windows that a table's perplexities are measured on."""
    columns = [column for column in table.columns if "perplexity" in column]
    return (
        list(dict.fromkeys(column["perplexity"] for column in columns)),
        list(dict.fromkeys(column["window"] for column in columns)),
    )


def tasks(table: Table) -> list[str]:
    """Tasks of a table, as lm-eval calls them."""
    return [column["task"] for column in table.columns if "task" in column]


def read(table: Table, entry: dict[str, Any]) -> Ours:
    """Find a table's figures in what was measured.

    Args:
        table: Says which.
        entry: The `model` of an evaluation.json.

    Returns:
        The figures, and how they were measured otherwise than the paper's.
    """
    ours = Ours([])
    measured = (entry.get("tasks") or {}).get("tasks", {})
    used: set[int] = set()
    for column in table.columns:
        value = None
        if "perplexity" in column:
            found = _perplexity(table, column, entry.get("perplexity") or [], used)
            if found is not None:
                value = math.nan if found["value"] is None else found["value"]
                ours.differs += _text_differs(column, found)
        elif "task" in column:
            value = _percent(measured.get(column["task"], {}).get(column["metric"]))
        elif column.get("average"):
            value = _average(table, ours.values)
        elif "cost" in column:
            value = _dig(entry.get("cost") or {}, column["cost"].split("."), column["unit"])
        ours.values.append(value)
    if measured:
        ours.differs += _tasks_differ(entry["tasks"])
    ours.differs = list(dict.fromkeys(ours.differs))
    return ours


def _perplexity(
    table: Table, column: dict[str, Any], entries: list[dict[str, Any]], used: set[int]
) -> dict[str, Any] | None:
    """The entry nearest to a column; one of another text stands in for one column at most."""
    own = [e for e in entries if e["text"] == column["perplexity"]]
    foreign = [e for e in entries if e["text"] not in texts(table)[0] and id(e) not in used]
    for found in (own, foreign):
        if found:
            best = min(found, key=lambda e: (e["window"] != column["window"], -e["tokens"]))
            used.add(id(best))
            return best
    return None


def _text_differs(column: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    found = []
    if entry["text"] != column["perplexity"]:
        found.append(f"text {entry['text']}, not {column['perplexity']}")
    if entry["window"] != column["window"]:
        found.append(f"windows of {entry['window']:,} tokens, not {column['window']:,}")
    if entry.get("stride", entry["window"]) != entry["window"]:
        found.append(f"stride {entry['stride']:,}")
    total = entry.get("tokenizer_tokens_total")
    if total is None:
        found.append(f"{entry['tokens']:,} tokens")
    elif total - entry["tokens"] >= entry["window"]:
        found.append(f"the first {entry['tokens']:,} of {total:,} tokens")
    return found


def _tasks_differ(found: dict[str, Any]) -> list[str]:
    protocol = found.get("protocol", {})
    differs = []
    if protocol.get("limit"):
        differs.append(f"the first {protocol['limit']:g} items of each task")
    if protocol.get("data", "hub") != "hub":
        differs.append(f"tasks from {protocol['data']}")
    missing = {name: t["not_run"] for name, t in found["tasks"].items() if "not_run" in t}
    return differs + [f"{name}: {reason}" for name, reason in missing.items()]


def _average(table: Table, values: list[float | None]) -> float | None:
    """Mean of the tasks' columns so far, if all of them were run."""
    pairs = zip(table.columns, values, strict=False)
    found = [value for column, value in pairs if "task" in column]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _dig(found: Any, keys: list[str], unit: float) -> float | None:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return None if found is None else found / unit
