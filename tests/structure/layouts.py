"""Layouts for tests: other units in each layer, and other numbers of them where asked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_prune.structure import LayerUnits, Layout, Structure


def cuttable(structure: Structure) -> list[str]:
    """The axes of which there is more than one unit."""
    first = structure.widths.sizes(0)
    return [axis for axis in structure.axes() if axis == "layer" or first[axis] > 1]


def varied(structure: Structure, axes: Sequence[str], seed: int = 0) -> Layout:
    """Keep other units, and other numbers of them, in each layer; two layers of three."""
    counts = [lambda n: n // 2, lambda n: n - 1, lambda n: n - n // 3]
    numbers = [
        {a: max(1, counts[i % 3](n)) for a, n in sizes.items()} for i, sizes in _each(structure)
    ]
    return _layout(structure, axes, numbers, structure.widths.shared["hidden"] * 2 // 3, seed)


def uniform(structure: Structure, axes: Sequence[str], seed: int = 0) -> Layout:
    """Keep other units in each layer, but the same number everywhere."""
    numbers = [{a: max(1, n // 2) for a, n in sizes.items()} for _, sizes in _each(structure)]
    return _layout(structure, axes, numbers, structure.widths.shared["hidden"] * 3 // 4, seed)


def _each(structure: Structure) -> list[tuple[int, dict[str, int]]]:
    return list(enumerate(structure.widths.layers))


def _layout(
    structure: Structure,
    axes: Sequence[str],
    numbers: list[dict[str, int]],
    hidden: int,
    seed: int,
) -> Layout:
    generator = torch.Generator().manual_seed(seed)

    def pick(total: int, kept: int) -> Tensor:
        return torch.randperm(total, generator=generator)[:kept].sort().values

    layers = []
    for layer, sizes in _each(structure):
        keep: dict[str, Tensor] = {}
        for axis in ("channel", "group"):
            if axis in axes:
                keep[axis] = pick(sizes[axis], numbers[layer][axis])
        groups = len(keep["group"]) if "group" in keep else sizes["group"]
        for axis in ("query", "value"):
            if axis in axes:
                rows = [pick(sizes[axis], numbers[layer][axis]) for _ in range(groups)]
                keep[axis] = torch.stack(rows)
        layers.append(LayerUnits(layer, keep))
    if "layer" in axes:
        del layers[1]
    kept = pick(structure.widths.shared["hidden"], hidden) if "hidden" in axes else None
    return Layout(structure.widths.copy(), kept, tuple(layers))
