"""Mean and variance of what readers of axes read, nothing being cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from lit_prune.calibration.statistics import InputStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import Ranks, device_of, inputs_of
from lit_prune.modes import evaluating
from lit_prune.structure.model import Structure


def dense_statistics(
    model: nn.Module,
    structure: Structure,
    stream: Stream,
    axes: Sequence[str],
    *,
    ranks: Ranks,
    track: Callable[[range], Iterator[int]] = iter,
) -> dict[tuple[int, str], InputStatistics]:
    """Mean and variance of the inputs of every reader of some axes, nothing being cut.

    Args:
        model: The model.
        structure: Its structure.
        stream: Calibration tokens before the first layer; afterwards it is behind the last.
        axes: Axes of the layers.
        ranks: What processes share.
        track: Wraps the layers' range in a progress bar.

    Returns:
        (layer, axis) -> statistics; axes with a reader in common share them.
    """
    found: dict[tuple[int, str], InputStatistics] = {}
    for layer in track(range(len(structure.widths.layers))):
        own = layer_statistics(model, structure, stream, layer, axes, ranks=ranks)
        found |= {(layer, axis): statistics for axis, statistics in own.items()}
    return found


def layer_statistics(
    model: nn.Module,
    structure: Structure,
    stream: Stream,
    layer: int,
    axes: Sequence[str],
    *,
    ranks: Ranks,
) -> dict[str, InputStatistics]:
    """Mean and variance of the inputs of one layer's readers, by axis; see `dense_statistics`.

    Args:
        model: The model.
        structure: Its structure.
        stream: Calibration tokens before the layer; afterwards it is behind it.
        layer: The layer.
        axes: Its axes.
        ranks: What processes share.
    """
    readers = {axis: structure.readers(model, axis, layer)[0].path for axis in axes}
    paths: dict[str, InputStatistics] = {}
    for path in dict.fromkeys(readers.values()):
        reader = model.get_submodule(path)
        paths[path] = InputStatistics(inputs_of(reader), device_of(reader))
    with evaluating(model), torch.no_grad():
        stream.advance(layer, inputs={model.get_submodule(p): s.add for p, s in paths.items()})
    for statistics in paths.values():
        statistics.reduce(ranks.reduce)
    return {axis: paths[path] for axis, path in readers.items()}
