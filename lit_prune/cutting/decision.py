"""From scores to a cut model: what methods have in common between scoring and cutting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_prune.allocation.ranking import Scores
from lit_prune.allocation.sensitivity import loss_rises, shares
from lit_prune.calibration.calibration import Batch, Calibration
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.cutting.layerwise import (
    ColumnScore,
    Ranks,
    Restoration,
    as_decided,
    matrix_of,
    mean_output,
    prune_layers,
    raise_bias,
    unit_scores,
)
from lit_prune.memory import in_halves
from lit_prune.structure import Layout, cut, cut_layer
from lit_prune.structure.layout import LayerUnits
from lit_prune.structure.norms import NormRescale, energies


def column_scores(calibration: Calibration, score: ColumnScore) -> Scores:
    """Scores of all units from statistics of the model as it is.

    Args:
        calibration: The model and its calibration tokens.
        score: Scores columns.
    """
    found: Scores = {axis: [] for axis in calibration.axes}
    for layer in calibration.layers():
        for axis in calibration.axes:
            reader, moments = calibration.reader(layer, axis), calibration.moments[layer, axis]
            values = unit_scores(calibration.structure, layer, axis, reader, moments, score)
            found[axis].append(values)
    return found


def layer_shares(
    calibration: Calibration,
    score: ColumnScore | Scores,
    target: float,
    protected: Sequence[int],
    restoration: Restoration,
) -> list[float]:
    """What each layer can give, from the loss when it alone is cut; 0 for protected ones.

    Args:
        calibration: The model, calibration tokens and windows set aside.
        score: The method's scores.
        target: Share of the decoder's parameters to remove, of several cuts in this one.
        protected: Layers that stay whole.
        restoration: The method's restoration.
    """
    structure = calibration.structure

    def units(layer: int, axis: str, reader: nn.Module, seen: InputStatistics) -> Tensor:
        if callable(score):
            return unit_scores(structure, layer, axis, reader, seen, score)
        return score[axis][layer]

    number = len(structure.widths.layers)
    layers = [layer for layer in range(number) if layer not in protected]
    rises = loss_rises(
        calibration.model,
        structure,
        calibration.stream(),
        calibration.stream(calibration.held),
        units,
        calibration.axes,
        layers=layers,
        restoration=restoration,
        ranks=calibration.ranks,
        track=calibration.track("sensitivity"),
    )
    goal = target if calibration.goal is None else calibration.goal
    given = dict(zip(layers, shares(rises, goal), strict=True))
    return [given.get(layer, 0.0) for layer in range(number)]


def agreed(ranks: Ranks, layout: Layout) -> Layout:
    """The first process' layout, on every process.

    Args:
        ranks: What processes share.
        layout: What this one has decided.
    """
    own = {f"{u.source} {axis}": kept for u in layout.layers for axis, kept in u.keep.items()}
    if layout.hidden is not None:
        own["hidden"] = layout.hidden
    found = ranks.agree(own)
    layers = {unit.source: LayerUnits(unit.source) for unit in layout.layers}
    for key, kept in found.items():
        if key != "hidden":
            layer, axis = key.split()
            layers[int(layer)].keep[axis] = kept
    return Layout(layout.of, found.get("hidden"), tuple(layers.values()))


def apply(
    calibration: Calibration,
    layout: Layout,
    restoration: Restoration,
    *,
    dense_means: bool = False,
) -> None:
    """Cut a model down to a layout, and restore what stays.

    Args:
        calibration: The model, which is cut in place, and its calibration tokens.
        layout: What stays.
        restoration: How it is repaired.
        dense_means: Whether biases make up for means in the dense model; else for those that
            readers get when the layers before them are cut.
    """
    model, structure = calibration.model, calibration.structure
    moments = calibration.moments if dense_means and restoration.kind == "bias" else None
    if moments is None:  # which are those of all layers
        layout = _drop_layers(calibration, layout)
    dense = calibration.stream() if restoration.kind == "unit_scales" else None
    layout = narrow_stream(calibration, layout)
    if restoration.kind == "none" or moments is not None:
        units = {unit.source: unit for unit in layout.layers if unit.keep}
        with torch.no_grad():
            for layer in calibration.track("layers", changes=True)(range(len(layout.of.layers))):
                if layer in units and moments is not None:
                    _compensate(calibration, units[layer])
                if layer in units:
                    cut_layer(model, structure, layer, units[layer].keep)
            cut(model, structure, Layout(structure.widths.copy(), None, _whole(layout)))
        return
    prune_layers(
        model,
        structure,
        calibration.stream(),
        as_decided(layout),
        calibration.axes,
        restoration=restoration,
        dense=dense,
        ranks=calibration.ranks,
        track=calibration.track("layers", changes=True),
    )


def _drop_layers(calibration: Calibration, layout: Layout) -> Layout:
    """Cut the layers that go, so that what stays is repaired without them; what is left to cut."""
    kept = [unit.source for unit in layout.layers]
    if kept == list(range(len(layout.of.layers))):
        return layout
    structure = calibration.structure
    with torch.no_grad():
        cut(calibration.model, structure, Layout(layout.of, None, _whole(layout)))
    layers = tuple(LayerUnits(place, unit.keep) for place, unit in enumerate(layout.layers))
    return Layout(structure.widths.copy(), layout.hidden, layers)


def narrow_stream(
    calibration: Calibration, layout: Layout, norm_rescale: NormRescale = "masked"
) -> Layout:
    """Cut a model's residual features, if some go, and nothing else.

    Args:
        calibration: The model, which is cut in place, and its calibration tokens.
        layout: What stays.
        norm_rescale: What RMS norms do; see `lit_prune.structure.norms.rescale`.

    Returns:
        What is left to cut.
    """
    if layout.hidden is None:
        return layout
    model, structure = calibration.model, calibration.structure
    found = {}
    if norm_rescale == "calibrated":
        found = energies(model, structure, [])

        def add(batch: Batch) -> None:
            for path, total in energies(model, structure, [batch]).items():
                found[path] += total

        in_halves(calibration.batches, add)
    found = {path: calibration.ranks.reduce(total) for path, total in found.items()}
    with torch.no_grad():
        hidden = Layout(layout.of, layout.hidden, _whole(layout))
        cut(model, structure, hidden, norm_rescale, found)
    return Layout(structure.widths.copy(), None, layout.layers)


def _whole(layout: Layout) -> tuple[LayerUnits, ...]:
    """The layers that stay, nothing cut from them."""
    return tuple(LayerUnits(unit.source) for unit in layout.layers)


def _compensate(calibration: Calibration, unit: LayerUnits) -> None:
    """Put what removed columns of a layer gave on average in the dense model into biases.

    With dense inputs, as "Fluctuation-based Adaptive Structured Pruning for Large Language Models"
    does it: nothing pruned is fed forward.
    """
    model, structure = calibration.model, calibration.structure
    sizes = structure.widths.sizes(unit.source)
    readers = {
        structure.readers(model, axis, unit.source)[0].path: axis for axis in unit.keep
    }  # each once, whatever axes of it are cut
    for axis in readers.values():
        site = structure.readers(model, axis, unit.source)[0]
        reader = model.get_submodule(site.path)
        if site.line.reads is None:
            raise TypeError(f"expected {site.path} to read an axis")
        weight = matrix_of(reader)
        gone = ~site.line.reads.mask(sizes, unit.keep).to(weight.device)
        mean = calibration.moments[unit.source, axis].mean
        raise_bias(reader, mean_output(weight, mean, gone))
