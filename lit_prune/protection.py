"""Layers that papers keep whole, as shares of a model's depth."""

from __future__ import annotations


def ends(layers: int, first: int, last: int, of: int = 32) -> list[int]:
    """The first and last layers of a model, as many as are the same share of its depth.

    Args:
        layers: Layers of the model.
        first: How many at the start of a model of `of` layers.
        last: How many at its end.
        of: Layers of that model.

    Returns:
        Their numbers, ascending; halves are rounded up.
    """
    before, after = ((2 * layers * n + of) // (2 * of) for n in (first, last))
    return [*range(before), *range(layers - after, layers)]
