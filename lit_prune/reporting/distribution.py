"""How scores are distributed, and which of them stay: a histogram for each axis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_prune.structure.layout import Layout

#: For each axis the scores of the units of each layer that was scored, as in `ranking.Scores`.
Scored = dict[str, dict[int, Tensor]]
_BINS = 40


def histograms(scores: Scored, layout: Layout, *, logarithms: bool = False) -> dict[str, Any]:
    """Histograms of scores over all scored layers, by axis.

    Args:
        scores: axis -> layer -> [units], or [groups, units] for `query` and `value`; those of
            `hidden` stand under layer 0. Infinite ones, of units that always stay, are left out.
        layout: What stays of the model that was scored.
        logarithms: Whether scores are natural logarithms of what shall be shown.

    Returns:
        axis -> `log10` (whether edges are decimal logarithms; not where scores are negative),
        `edges` [41], `kept` and `removed` [40] (units in each bin), and `zeros`: units with a
        score of 0, which has no logarithm. An axis without a finite score is left out.
    """
    found = {}
    for axis, layers in scores.items():
        parts = [_divided(values, layout, axis, layer) for layer, values in layers.items()]
        if parts:
            values, kept = (torch.cat(column) for column in zip(*parts, strict=True))
            finite = values.isfinite()
            if finite.any():
                found[axis] = _histogram(values[finite], kept[finite], logarithms=logarithms)
    return found


def _divided(values: Tensor, layout: Layout, axis: str, layer: int) -> tuple[Tensor, Tensor]:
    """Scores of a layer and whether their units stay, [all units] each."""
    values = values.detach().double().cpu()
    if axis == "hidden":
        kept = layout.hidden
    else:
        units = next((unit.keep for unit in layout.layers if unit.source == layer), None)
        if units is None:  # the layer is gone
            return values.flatten(), torch.zeros(values.numel(), dtype=torch.bool)
        kept = units.get(axis)
    stays = torch.ones(values.shape, dtype=torch.bool)
    if kept is not None:
        stays = torch.zeros(values.shape, dtype=torch.bool).scatter(-1, kept.cpu(), True)
    return values.flatten(), stays.flatten()


def _histogram(values: Tensor, kept: Tensor, *, logarithms: bool) -> dict[str, Any]:
    """The histogram of some scores [units], of which some are kept [units]."""
    zeros, log10 = 0, True
    if logarithms:
        values = values / math.log(10)
    elif (values < 0).any():
        log10 = False
    else:
        positive = values > 0
        zeros = int((~positive).sum())
        values, kept = values[positive].log10(), kept[positive]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(values, edges[1:-1], right=True)
    return {
        "log10": log10,
        "edges": edges.tolist(),
        "kept": torch.bincount(bins[kept], minlength=_BINS).tolist(),
        "removed": torch.bincount(bins[~kept], minlength=_BINS).tolist(),
        "zeros": zeros,
    }
