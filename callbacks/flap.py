"""FLAP: fluctuations of dense activations, one threshold for all, biases for what is gone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.cutting.layerwise import Repair, inputs_of, unit_scores
from lit_prune.pruning import Allocation, AxisName, PruningCallback
from lit_prune.scores.flap import fluctuation, standardised


class FLAPPruning(PruningCallback):
    """Prunes the columns whose outputs fluctuate least, and puts their mean into biases.

    Statistics are those of the dense model throughout: nothing pruned is fed forward.

    Source: "Fluctuation-based Adaptive Structured Pruning for Large Language Models".

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        axes: What is cut; one threshold decides over heads and channels together.
        allocation: As for `lit_prune.pruning.PruningCallback`; the paper's is ``global``.
        restoration: Likewise; the paper's is ``bias``. Models without biases on O and down get
            some, and are then no longer stock checkpoints.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "FLAP"
    by_layer = True
    dense_means = True
    standardised = True

    def __init__(
        self,
        sparsity: float = 0.2,
        axes: Sequence[AxisName] = ("group", "channel"),
        allocation: Allocation = "global",
        restoration: Repair = "bias",
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity=sparsity, axes=axes, allocation=allocation, restoration=restoration, **options
        )

    def score(self, calibration: Calibration) -> Scores:
        """Standardised fluctuations, averaged over each unit's columns.

        Args:
            calibration: The model and its calibration tokens.
        """
        scores: Scores = {axis: [] for axis in calibration.axes}
        for layer in calibration.layers():
            for axis in calibration.axes:
                scores[axis].append(self._layer(calibration, layer, axis))
        return scores

    def _layer(self, calibration: Calibration, layer: int, axis: str) -> Tensor:
        reader = calibration.reader(layer, axis)
        columns = partial(_columns, squared=axis != "channel")
        statistics = calibration.moments[layer, axis]
        sums = unit_scores(calibration.structure, layer, axis, reader, statistics, columns)
        return sums * (sums.numel() / inputs_of(reader))


def _columns(weight: Tensor, statistics: InputStatistics, *, squared: bool) -> Tensor:
    return standardised(fluctuation(weight, statistics.variance), squared=squared)
