"""From scores to a cut model: what methods have in common between scoring and cutting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lit_prune.calibrating import Calibration
from lit_prune.layerwise import (
    ColumnScore,
    Restoration,
    as_decided,
    matrix_of,
    mean_output,
    prune_layers,
    raise_bias,
    unit_scores,
)
from lit_prune.ranking import Scores
from lit_prune.sensitivity import loss_rises, shares
from lit_prune.statistics import InputStatistics
from lit_prune.structure import Layout, cut
from lit_prune.structure.layout import LayerUnits
from lit_prune.structure.norms import NormRescale, energies


def column_scores(calibration: Calibration, score: ColumnScore) -> Scores:
    """Scores of all units from statistics of the model as it is.

    Args:
        calibration: The model and its calibration tokens.
        score: Scores columns.
    """
    structure, found = calibration.structure, {}
    for axis in calibration.axes:
        found[axis] = [
            unit_scores(
                structure,
                layer,
                axis,
                calibration.reader(layer, axis),
                calibration.moments[layer, axis],
                score,
            )
            for layer in range(len(structure.widths.layers))
        ]
    return found


def layer_shares(
    calibration: Calibration,
    score: ColumnScore | Scores,
    protected: Sequence[int],
    restoration: Restoration,
) -> list[float]:
    """What each layer can give, from the loss when it alone is cut; 0 for protected ones.

    Args:
        calibration: The model, calibration tokens and windows set aside.
        score: The method's scores.
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
        (calibration.stream(calibration.held), calibration.held),
        units,
        calibration.axes,
        layers=layers,
        restoration=restoration,
        ranks=calibration.ranks,
        track=calibration.track("sensitivity"),
    )
    given = dict(zip(layers, shares(rises), strict=True))
    return [given.get(layer, 0.0) for layer in range(number)]


def agreed(calibration: Calibration, layout: Layout) -> Layout:
    """The first process' layout, on every process.

    Args:
        calibration: What processes share.
        layout: What this one has decided.
    """
    own = {f"{u.source} {axis}": kept for u in layout.layers for axis, kept in u.keep.items()}
    if layout.hidden is not None:
        own["hidden"] = layout.hidden
    found = calibration.ranks.agree(own)
    layers = {unit.source: LayerUnits(unit.source) for unit in layout.layers}
    for key, kept in found.items():
        if key != "hidden":
            layer, axis = key.split()
            layers[int(layer)].keep[axis] = kept
    return Layout(layout.of, found.get("hidden"), tuple(layers.values()))


def apply(calibration: Calibration, layout: Layout, restoration: Restoration) -> None:
    """Cut a model down to a layout, and restore what stays.

    Args:
        calibration: The model, which is cut in place, and its calibration tokens.
        layout: What stays.
        restoration: How it is repaired.
    """
    model, structure = calibration.model, calibration.structure
    dense = calibration.stream() if restoration.kind == "unit_scales" else None
    if restoration.kind == "bias" and "moments" in vars(calibration):
        _compensate(calibration, layout)
        restoration = replace(restoration, kind="none")
    layout = narrow_stream(calibration, layout)
    if restoration.kind == "none":
        with torch.no_grad():
            cut(model, structure, layout)
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
        track=calibration.track("layers"),
    )


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
        found = energies(model, structure, calibration.batches)
    found = {path: calibration.ranks.reduce(total) for path, total in found.items()}
    whole = tuple(LayerUnits(unit.source) for unit in layout.layers)
    with torch.no_grad():
        cut(model, structure, Layout(layout.of, layout.hidden, whole), norm_rescale, found)
    return Layout(structure.widths.copy(), None, layout.layers)


def _compensate(calibration: Calibration, layout: Layout) -> None:
    """Put what removed columns gave on average in the dense model into biases.

    Layer by layer with dense inputs, as "Fluctuation-based Adaptive Structured Pruning for Large
    Language Models" does it: nothing pruned is fed forward.
    """
    structure = calibration.structure
    for unit in layout.layers:
        sizes = structure.widths.sizes(unit.source)
        readers = {
            structure.readers(calibration.model, axis, unit.source)[0].path: axis
            for axis in unit.keep
        }  # each once, whatever axes of it are cut
        for axis in readers.values():
            site = structure.readers(calibration.model, axis, unit.source)[0]
            reader = calibration.model.get_submodule(site.path)
            if site.line.reads is None:
                raise TypeError(f"expected {site.path} to read an axis")
            weight = matrix_of(reader)
            gone = ~site.line.reads.mask(sizes, unit.keep).to(weight.device)
            mean = calibration.moments[unit.source, axis].mean
            raise_bias(reader, mean_output(weight, mean, gone))
