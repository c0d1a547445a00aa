"""`lit-prune inspect`: what can be cut from a model and what that would save, without weights."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from lit_prune.allocation.plan import uniform
from lit_prune.console import stdout_console
from lit_prune.errors import UserError
from lit_prune.evaluation.sizes import axis_sizes, expected, reachable, totals
from lit_prune.evaluation.skeleton import skeleton
from lit_prune.structure import Structure
from lit_prune.structure.counting import unique_labels
from lit_prune.structure.layout import ranges
from lit_prune.structure.limits import require_axes, require_stock

_WIDTH = 110  # of a table where there is no terminal
_IN_MB = ("weight_bytes", "cache_bytes")
_ROWS = {
    "decoder_parameters": "decoder parameters",
    "parameters": "all parameters",
    "macs_per_token": "MACs per token, {length:,} in context",
    "weight_bytes": "weights, MB in {dtype}",
    "cache_bytes_per_token": "KV cache, bytes of a token",
    "cache_bytes": "KV cache, MB of {length:,} tokens",
}


def inspect_model(
    model: str,
    *,
    sparsity: float | None = None,
    method: Literal["fasp"] = "fasp",
    axes: list[Literal["channel", "group", "query", "value"]] = ["channel"],  # noqa: B006
    protected_layers: list[int] = [],  # noqa: B006 - the command line shows the default
    stock: bool = False,
    length: int = 2048,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16",
    trust_remote_code: bool = False,
    token: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """List what can be cut from a model and what that would save; needs no weights.

    Args:
        model: Hub id, folder, .gguf file, embedded:smollm2-135m-instruct or an earlier export.
        sparsity: Show what is left when this share of the decoder's parameters goes.
        method: How it would be spread over the layers.
        axes: What goes: channels, and of attention one of KV groups, query heads or value channels.
        protected_layers: Layers that stay whole.
        stock: Only what the family's own config can express.
        length: Tokens in the context, for multiply-accumulates and the KV cache.
        dtype: Type of weights and KV cache; auto for the config's.
        trust_remote_code: Let code from the model's repository run.
        token: Send the stored hub token, as gated models need.
        json: Print JSON instead of tables.

    Returns:
        What is printed as JSON.
    """
    if length < 1:
        raise UserError(f"expected a length of at least 1, got {length}")
    structure, empty = _read(model, {"trust_remote_code": trust_remote_code, "token": token})
    empty.to(_dtype(dtype, empty.config))
    found: dict[str, Any] = {
        "model": model,
        "model_type": empty.config.model_type,
        "dtype": str(empty.dtype).removeprefix("torch."),
        "length": length,
        "axes": axis_sizes(empty, structure, length),
        "totals": totals(empty, structure, length),
    }
    if sparsity is not None:
        options = {"protected_layers": list(protected_layers), "stock": stock}
        found["cut"] = {
            "method": method,
            "axes": list(axes),
            **options,
            **_cut(empty, structure, sparsity, axes, length, **options),
        }
    if json:
        print(json_text.dumps(found, indent=2))
    else:
        _print(found)
    return found


def _read(source: str, access: Mapping[str, bool]) -> tuple[Structure, Any]:
    try:
        return skeleton(source, access)
    except UserError as error:  # this command has the options without a group
        raise UserError(str(error).replace("--model.", "--")) from error


def _dtype(name: str, config: Any) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _cut(
    model: Any,
    structure: Structure,
    sparsity: float,
    axes: Sequence[str],
    length: int,
    *,
    protected_layers: Sequence[int],
    stock: bool,
) -> dict[str, Any]:
    """What is left of the model, which is cut in place."""
    model_type = model.config.model_type
    require_axes(model_type, structure.axes(), axes)
    if stock:
        require_stock(model_type, structure.family, structure.widths, axes)
    labels = unique_labels(model, structure)
    plan = uniform(
        labels, structure.widths, sparsity, axes, protected=protected_layers, stock=stock
    )
    most = reachable(labels, structure.widths, axes, protected_layers)
    left = expected(model, structure, plan, length)
    return {**left, "sparsity": {"target": sparsity, "most": most, **left["sparsity"]}}


def _print(found: Mapping[str, Any]) -> None:
    console = stdout_console(_WIDTH)
    console.print(_axes_table(found))
    units = "; ".join(f"{entry['axis']}: {entry['unit']}" for entry in found["axes"])
    console.print(f"one of {units}", highlight=False, soft_wrap=True)
    console.print(_totals_table(found))
    if "cut" in found:
        _print_cut(console, found["cut"])


def _axes_table(found: Mapping[str, Any]) -> Table:
    table = Table(title=f"{found['model']} ({found['model_type']})")
    table.add_column("axis")
    for column in ("units", "parameters of one", "MACs of one", "of all", "MACs of all"):
        table.add_column(column, justify="right")
    table.add_column("of the decoder", justify="right")
    for entry in found["axes"]:
        table.add_row(
            entry["axis"],
            _span(entry["units"]),
            _span(entry["unit_parameters"]),
            _span(entry["unit_macs"]),
            f"{entry['parameters']:,}",
            f"{entry['macs']:,}",
            f"{entry['decoder_share']:.1%}",
        )
    return table


def _totals_table(found: Mapping[str, Any]) -> Table:
    """The sizes now, and beside them those after the cut."""
    sides = [found["totals"], *([found["cut"]] if "cut" in found else [])]
    table = Table()
    for column, justify in (("", "left"), ("now", "right"), ("after", "right"))[: 1 + len(sides)]:
        table.add_column(column, justify=justify)  # pyright: ignore[reportArgumentType]
    for key, text in _ROWS.items():
        table.add_row(text.format(**found), *(_cell(key, side[key]) for side in sides))
    return table


def _print_cut(console: Console, cut: Mapping[str, Any]) -> None:
    sparsity = cut["sparsity"]
    table = Table(title=f"{cut['method']} at {sparsity['target']:.1%}")
    table.add_column("axis")
    table.add_column("units left", justify="right")
    table.add_column("in layers")
    for axis, widths in cut["widths"].items():
        for width in sorted(set(widths), reverse=True):
            layers = [layer for layer, each in enumerate(widths) if each == width]
            table.add_row(axis, f"{width:,}", ranges(layers))
    console.print(table)
    needs = "stock" if cut["stock"] else "not stock: it carries a modelling file"
    for line in (
        f"removed: {sparsity['decoder']:.2%} of the decoder's parameters, "
        f"{sparsity['total']:.2%} of all",
        f"reachable with {' and '.join(cut['axes'])}: up to {sparsity['most']:.2%} of the decoder",
        f"checkpoint: {needs}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _cell(key: str, value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 1e6:,.1f}" if key in _IN_MB else f"{value:,}"
