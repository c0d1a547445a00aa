"""Models side by side: a row for each figure and its protocol, a column for each model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_prune.evaluation.texts import PROTOCOL

if TYPE_CHECKING:
    from rich.table import Table

Entry = Mapping[str, Any]
NOTHING = "-"


@dataclass
class Row:
    """A figure of all models.

    Attributes:
        section: What rows around it are about.
        label: Which figure, and how it was measured.
        cells: One for each model.
    """

    section: str
    label: str
    cells: list[str] = field(default_factory=list)


def columns(records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Entry]]:
    """Names and entries of all models, a dense one that several were compared with once.

    Args:
        records: Names and records, see `lit_prune.evaluation.record`.
    """
    found: list[tuple[str, Entry]] = []
    seen = set()
    for name, record in records:
        dense = record["dense"]
        if dense is not None:
            key = (dense["source"], dense.get("digest"))
            if key not in seen:
                seen.add(key)
                found.append((dense["source"], dense))
        found.append((name, record["model"]))
    return found


def rows(entries: Sequence[Entry]) -> list[Row]:
    """The rows of a comparison; a figure that a model has not is a dash.

    Figures of different protocols are in different rows.

    Args:
        entries: One for each column, see `lit_prune.evaluation.record`.
    """
    found = [*_sizes(entries), *_perplexities(entries), *_tasks(entries), *_speeds(entries)]
    return [row for row in found if any(cell != NOTHING for cell in row.cells)]


def render(names: Sequence[str], found: Sequence[Row]) -> Table:
    """A table for the terminal.

    Args:
        names: Of the models.
        found: What `rows` gave.
    """
    from rich.table import Table

    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    section = None
    for row in found:
        if row.section != section:
            if section is not None:
                table.add_section()
            section = row.section
            table.add_row(f"[bold]{section}[/]")
        table.add_row(row.label, *row.cells)
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
    return [cell.replace("|", "\\|") for cell in cells]


def _row(
    section: str, label: str, entries: Sequence[Entry], cell: Callable[[Entry], str | None]
) -> Row:
    return Row(section, label, [cell(entry) or NOTHING for entry in entries])


def _sizes(entries: Sequence[Entry]) -> list[Row]:
    def number(*path: str, per: float = 1, form: str = "{:,.0f}") -> Callable[[Entry], str | None]:
        def cell(entry: Entry) -> str | None:
            value: Any = entry.get("cost") or {}
            for key in path:
                value = (value or {}).get(key)
            return None if value is None else form.format(value / per)

        return cell

    lengths = _union(list((entry.get("cost") or {}).get("macs_per_token", ())) for entry in entries)
    mega = "{:,.1f}"
    asked = [
        ("parameters", number("parameters")),
        ("of the decoder", number("decoder_parameters")),
        ("checkpoint, MB", number("checkpoint_bytes", per=1e6, form=mega)),
        ("weights in memory, MB", number("weight_bytes", per=1e6, form=mega)),
        ("KV cache, bytes of a token", number("cache_bytes_per_token")),
    ]
    for length in lengths:
        asked += [
            (
                f"MACs of a token, {int(length):,} in context, millions",
                number("macs_per_token", length, per=1e6, form=mega),
            ),
            (
                f"MACs of a sequence of {int(length):,}, billions",
                number("macs_of_sequence", length, per=1e9, form=mega),
            ),
        ]
    return [_row("size", label, entries, cell) for label, cell in asked]


def _perplexities(entries: Sequence[Entry]) -> list[Row]:
    found = []
    protocols = _union(
        [tuple(each.get(key) for key in PROTOCOL) for each in entry["perplexity"]]
        for entry in entries
    )
    for wanted in protocols:

        def cell(entry: Entry, wanted: tuple[Any, ...] = wanted) -> str | None:
            for each in entry["perplexity"]:
                if tuple(each.get(key) for key in PROTOCOL) == wanted:
                    return _perplexity(each)
            return None

        label = perplexity_label(dict(zip(PROTOCOL, wanted, strict=True)))
        found.append(_row("perplexity", label, entries, cell))
    return found


def perplexity_label(protocol: Mapping[str, Any]) -> str:
    """How a perplexity was measured, on one line.

    Args:
        protocol: The keys `lit_prune.evaluation.texts.PROTOCOL`.
    """
    window, stride = protocol["window"], protocol["stride"]
    parts = [
        f"{protocol['text']} ({protocol['split']})",
        f"windows of {window:,}",
        *([f"stride {stride:,}"] if stride not in (None, window) else []),
        f"{protocol['tokens']:,} tokens",
        str(protocol["dtype"]),
    ]
    return ", ".join(parts)


def _perplexity(each: Mapping[str, Any]) -> str:
    value, ratio = each["value"], each.get("ratio")
    if value is None:
        return "not finite"
    return f"{value:,.2f}" + (f" ({ratio:.3f} x)" if ratio else "")


def _tasks(entries: Sequence[Entry]) -> list[Row]:
    found = []
    protocols = _union(
        [tuple(sorted((each.get("tasks") or {}).get("protocol", {}).items()))] for each in entries
    )
    for wanted in filter(None, protocols):
        mine = [
            each["tasks"]
            if each.get("tasks") and tuple(sorted(each["tasks"]["protocol"].items())) == wanted
            else {"tasks": {}, "averages": {}}
            for each in entries
        ]
        section = "tasks: " + ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in wanted if value is not None
        )
        for part in ("tasks", "averages"):
            for name in _union(list(each[part]) for each in mine):
                cells = [_task(each[part].get(name)) for each in mine]
                shots = [each[part][name].get("fewshot") for each in mine if name in each[part]]
                count = next((shot for shot in shots if shot is not None), None)
                label = f"average, {name}" if part == "averages" else name
                label += "" if count is None else f", {count}-shot"
                found.append(Row(section, label, cells))
    return found


def _task(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return NOTHING
    if "not_run" in result:
        return "not run"
    if "value" in result:
        return f"{result['value']:.4f}"
    parts = [
        f"{name} {result[name]:.4f} ± {result[f'{name}_stderr']:.4f}"
        for name in ("acc", "acc_norm")
        if result.get(name) is not None and result.get(f"{name}_stderr") is not None
    ]
    return "\n".join(parts) or NOTHING


def _speeds(entries: Sequence[Entry]) -> list[Row]:
    found = []
    protocols = _union(
        [tuple(sorted((each.get("speed") or {}).get("protocol", {}).items()))] for each in entries
    )
    for wanted in filter(None, protocols):
        mine = [
            each["speed"]
            if each.get("speed") and tuple(sorted(each["speed"]["protocol"].items())) == wanted
            else {"batches": {}}
            for each in entries
        ]
        asked = dict(wanted)
        section = (
            f"speed: prompt {asked.pop('prompt')}, {asked.pop('new_tokens')} new tokens, median of "
            f"{asked.pop('rounds')} rounds (least to most), "
        ) + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asked.items())
        for batch in _union(list(each["batches"]) for each in mine):
            for part in ("prefill", "decode"):
                taken = [each["batches"].get(batch, {}) for each in mine]
                label = f"{part}, batch {batch}"
                speeds = [_speed(each, part) for each in taken]
                found.append(Row(section, f"{label}, tokens/s", speeds))
                found.append(Row(section, f"{label}, ms", [_latency(each, part) for each in taken]))
        memory = [_memory(each.get("memory")) for each in mine]
        found.append(Row(section, "peak memory beside the libraries, MB", memory))
    return found


def _speed(batch: Mapping[str, Any], part: str) -> str:
    if "not_run" in batch:
        return "not run"
    if part not in batch:
        return NOTHING
    text = _span(batch[part]["tokens_per_second"], "{:,.0f}")
    ratio = batch[part]["ratio"]
    if ratio is None:
        return text
    claim = "" if batch[part]["faster"] else ", ranges overlap"
    return f"{text}\n{_span(ratio, '{:.2f}')} x{claim}"


def _latency(batch: Mapping[str, Any], part: str) -> str:
    return _span(batch[part]["latency_ms"], "{:,.1f}") if part in batch else NOTHING


def _span(stat: Mapping[str, float], form: str) -> str:
    median, low, high = (form.format(stat[key]) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _memory(memory: Mapping[str, Any] | None) -> str:
    if not memory or "peak_bytes" not in memory:
        return NOTHING
    return f"{(memory['peak_bytes'] - memory['baseline_bytes']) / 1e6:,.0f}"


def _union(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """All members, each once, in their order."""
    return list(dict.fromkeys(member for each in lists for member in each))
