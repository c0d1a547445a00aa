"""The rows of a comparison, of each kind of figure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_prune.evaluation.texts import PROTOCOL

Entry = Mapping[str, Any]
Key = tuple[Any, ...]
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


def union(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """All members, each once, in their order.

    Args:
        lists: Of members that can be hashed.
    """
    return list(dict.fromkeys(member for each in lists for member in each))


def told_apart(labels: Mapping[Any, str]) -> dict[Any, str]:
    """Labels with a short digest of their key where another key has the same label.

    Args:
        labels: Protocol, as a tuple of plain types -> how it is called.
    """
    all_of_them = list(labels.values())
    return {
        key: label if all_of_them.count(label) == 1 else f"{label}, protocol {_short(key)}"
        for key, label in labels.items()
    }


def _short(key: Any) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:6]


def sources(entry: Entry) -> list[Entry]:
    """A model's entry, and those of other records.

    Args:
        entry: See `lit_prune.reporting.compare.columns`.
    """
    return [entry, *entry.get("also", ())]


def sizes(entries: Sequence[Entry]) -> list[Row]:
    """Parameters, bytes and operations.

    Args:
        entries: One for each column.
    """
    costs = [[each.get("cost") or {} for each in sources(entry)] for entry in entries]
    every = [cost for each in costs for cost in each]
    dtypes = union([cost.get("dtype")] for cost in every)

    def row(label: str, *path: str, per: float = 1, form: str = "{:,.0f}", **of: Any) -> Row:
        def cell(known: Sequence[Mapping[str, Any]]) -> str:
            for cost in known:
                value: Any = cost
                for key in path:
                    value = (value or {}).get(key)
                if value is not None and all(cost.get(key) == it for key, it in of.items()):
                    return form.format(value / per)
            return NOTHING

        return Row("size", label, [cell(known) for known in costs])

    mega = "{:,.1f}"
    found = [
        row("parameters", "parameters"),
        row("of the decoder", "decoder_parameters"),
        row("checkpoint, MB", "checkpoint_bytes", per=1e6, form=mega),
    ]
    for dtype in dtypes:
        in_it = "" if dtype is None else f", {dtype}"
        label = f"weights in memory, MB{in_it}"
        found.append(row(label, "weight_bytes", per=1e6, form=mega, dtype=dtype))
    for dtype in dtypes:
        in_it = "" if dtype is None else f", {dtype}"
        label = f"KV cache, bytes of a token{in_it}"
        found.append(row(label, "cache_bytes_per_token", dtype=dtype))
    for length in union((cost.get("macs_per_token") or ()) for cost in every):
        label = f"MACs of a token, {int(length):,} in context, millions"
        found.append(row(label, "macs_per_token", length, per=1e6, form=mega))
        label = f"MACs of a sequence of {int(length):,}, billions"
        found.append(row(label, "macs_of_sequence", length, per=1e9, form=mega))
    return found


def perplexities(entries: Sequence[Entry]) -> list[Row]:
    """A row for each protocol.

    Args:
        entries: One for each column.
    """
    figures = [{_protocol(each): each for each in entry["perplexity"]} for entry in entries]
    return [
        Row("perplexity", label, [_perplexity(known.get(key)) for known in figures])
        for key, label in perplexity_labels(entries).items()
    ]


def perplexity_labels(entries: Iterable[Entry]) -> dict[Key, str]:
    """Protocol -> how it is called, of all perplexities.

    Args:
        entries: Of models.
    """
    protocols = union(map(_protocol, entry["perplexity"]) for entry in entries)
    return told_apart({key: _called(key) for key in protocols})


def _protocol(each: Mapping[str, Any]) -> Key:
    return tuple(each.get(key) for key in PROTOCOL)


def _called(key: Key) -> str:
    """How a perplexity was measured, on one line."""
    protocol = dict(zip(PROTOCOL, key, strict=True))
    window, stride = protocol["window"], protocol["stride"]
    parts = [
        f"{protocol['text']} ({protocol['split']})",
        f"windows of {window:,}",
        *([f"stride {stride:,}"] if stride not in (None, window) else []),
        f"{protocol['tokens']:,} tokens",
        str(protocol["dtype"]),
    ]
    return ", ".join(parts)


def _perplexity(each: Mapping[str, Any] | None) -> str:
    if each is None:
        return NOTHING
    value, ratio = each["value"], each.get("ratio")
    if value is None:
        return "not finite"
    return f"{value:,.2f}" + (f" ({ratio:.3f} x)" if ratio else "")


def asked_of(measured: Mapping[str, Any]) -> Key:
    """The protocol of tasks or of speed, names and values.

    Args:
        measured: Of an entry.
    """
    return tuple(sorted(measured.get("protocol", {}).items()))


def speeds(entries: Sequence[Entry]) -> list[Row]:
    """Speed, latency and memory of each protocol.

    Args:
        entries: One for each column.
    """
    found = []
    timed = [speeds_of(entry) for entry in entries]
    for wanted in union(timed):
        mine = [each.get(wanted, {"batches": {}}) for each in timed]
        asked = dict(wanted)
        section = (
            f"speed: prompt {asked.pop('prompt')}, {asked.pop('new_tokens')} new tokens, median of "
            f"{asked.pop('rounds')} rounds (least to most), "
        ) + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asked.items())
        for batch in union(list(each["batches"]) for each in mine):
            for part in ("prefill", "decode"):
                taken = [each["batches"].get(batch, {}) for each in mine]
                label = f"{part}, batch {batch}"
                cells = [_speed(each, part) for each in taken]
                found.append(Row(section, f"{label}, tokens/s", cells))
                found.append(Row(section, f"{label}, ms", [_latency(each, part) for each in taken]))
        memory = [_memory(each.get("memory")) for each in mine]
        found.append(Row(section, "peak memory beside the libraries, batch 1, MB", memory))
    return found


def speeds_of(entry: Entry) -> dict[Key, Mapping[str, Any]]:
    """Protocol -> the first of a model's measurements by it.

    Args:
        entry: See `lit_prune.reporting.compare.columns`.
    """
    found: dict[Key, Mapping[str, Any]] = {}
    for each in sources(entry):
        if each.get("speed"):
            found.setdefault(asked_of(each["speed"]), each["speed"])
    return found


def _speed(batch: Mapping[str, Any], part: str) -> str:
    if "not_run" in batch:
        return "not run"
    if part not in batch:
        return NOTHING
    figures = batch[part]
    text, ratio = _span(figures["tokens_per_second"], "{:,.0f}"), figures["ratio"]
    if ratio is None:
        return text
    # a record of before `slower` was noted: slower in all rounds claims no gain either
    apart = figures["faster"] or figures.get("slower", ratio["high"] < 1)
    return f"{text}\n{_span(ratio, '{:.2f}')} x{'' if apart else ', ranges overlap'}"


def _latency(batch: Mapping[str, Any], part: str) -> str:
    return _span(batch[part]["latency_ms"], "{:,.1f}") if part in batch else NOTHING


def _span(stat: Mapping[str, float], form: str) -> str:
    median, low, high = (form.format(stat[key]) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _memory(memory: Mapping[str, Any] | None) -> str:
    if not memory or "peak_bytes" not in memory:
        return NOTHING
    return f"{(memory['peak_bytes'] - memory['baseline_bytes']) / 1e6:,.0f}"
