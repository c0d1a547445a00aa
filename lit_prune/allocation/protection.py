"""Layers that papers keep whole, as shares of a model's depth."""

from __future__ import annotations

#: Layers of the models that papers say it of.
_OF = 32


def ends(layers: int, first: int, last: int) -> list[int]:
    """The first and last layers of a model, as many as are the same share of its depth.

    Args:
        layers: Layers of the model.
        first: How many at the start of a model of 32 layers.
        last: How many at its end.

    Returns:
        Their numbers, ascending; halves are rounded up.
    """
    before, after = ((2 * layers * n + _OF) // (2 * _OF) for n in (first, last))
    return [*range(before), *range(layers - after, layers)]
