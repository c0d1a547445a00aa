"""Small tables for validate, test and predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.table import Table

from lit_prune.console import stdout_console


@rank_zero_only
def print_metrics(
    title: str, results: Sequence[Mapping[str, float]], protocol: Mapping[str, Any] | None = None
) -> None:
    """Print what was logged, and what it was measured on.

    Args:
        title: The table's title.
        results: One mapping of names to numbers per data loader.
        protocol: Names and values of what it was measured on.
    """
    table = Table(title=title)
    table.add_column("metric")
    for index in range(len(results)):
        table.add_column("value" if len(results) == 1 else f"loader {index}", justify="right")
    for name in dict.fromkeys(name for result in results for name in result):
        values = [result.get(name) for result in results]
        table.add_row(name, *("" if value is None else f"{value:.5g}" for value in values))
    if protocol:
        table.add_section()
    for name, value in (protocol or {}).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    stdout_console().print(table)


@rank_zero_only
def print_predictions(results: Sequence[Any] | None) -> None:
    """Print how many batches came out and of what kind.

    Args:
        results: What `predict_step` returned, batch by batch.
    """
    batches = list(results or [])
    table = Table(title="predict")
    table.add_column("batches", justify="right")
    table.add_column("each")
    table.add_row(str(len(batches)), _describe(batches[0]) if batches else "")
    stdout_console().print(table)


def _describe(item: Any) -> str:
    if isinstance(item, torch.Tensor):
        return f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)}"
    if isinstance(item, Mapping):
        return ", ".join(f"{name}: {_describe(value)}" for name, value in item.items())
    return str(item) if isinstance(item, str | int | float) else type(item).__name__
