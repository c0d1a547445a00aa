"""What a module can say of its model for the card of the checkpoint."""

from __future__ import annotations

from typing import Any

from lit_prune.reporting.card import model_card
from lit_prune.reporting.report import load_lines


def card_of(module: Any, name: str) -> str:
    """The model card of a `PrunableLM`.

    Args:
        module: The module, finished.
        name: The checkpoint's name in the lines that load it.
    """
    last = module.history[-1] if module.history else {}
    return model_card(
        module.report,
        [*module.lineage, *module.history[:-1]],
        module.pretrained,
        {
            "name": last.get("method", "none"),
            "options": last.get("options", {}),
            "lora": module.adapter is not None,
            "widths": widths_summary(module.layout),
        },
        load_lines(name, stock=module.is_stock),
        module.is_stock,
    )


def widths_summary(layout: Any) -> dict[str, dict[str, Any]]:
    """Widths before and after for the axes that were cut: axis -> {"dense", "kept"}."""
    before, after = layout.of, layout.widths()
    summary: dict[str, dict[str, Any]] = {}
    for axis in ("channel", "group", "query", "value"):
        dense = [sizes[axis] for sizes in before.layers]
        kept = [sizes[axis] for sizes in after.layers]
        if dense != kept:
            summary[axis] = {"dense": _short(dense), "kept": _short(kept)}
    if before.shared["hidden"] != after.shared["hidden"]:
        summary["hidden"] = {"dense": before.shared["hidden"], "kept": after.shared["hidden"]}
    if len(before.layers) != len(after.layers):
        summary["layer"] = {"dense": len(before.layers), "kept": len(after.layers)}
    return summary


def layer_widths(layout: Any) -> dict[str, dict[str, list[int]]]:
    """Widths of all axes: axis -> {"dense", "kept"}, each a number for every layer of before.

    A layer that is gone keeps nothing. ``hidden``, which all layers share, has a single number.
    """
    before, after = layout.of, layout.widths()
    left = {unit.source: sizes for unit, sizes in zip(layout.layers, after.layers, strict=True)}
    widths = {}
    for axis in ("channel", "group", "query", "value"):
        dense = [sizes[axis] for sizes in before.layers]
        kept = [left[layer][axis] if layer in left else 0 for layer in range(len(dense))]
        widths[axis] = {"dense": dense, "kept": kept}
    hidden = {"dense": [before.shared["hidden"]], "kept": [after.shared["hidden"]]}
    return widths | {"hidden": hidden}


def _short(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
