"""Methods as another package would write them, from public parts alone."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune.allocation.ranking import kept_units, ranked
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.cutting.layerwise import ColumnScore
from lit_prune.pruning import PruningCallback
from lit_prune.scores.magnitude import magnitude
from lit_prune.structure import Layout, cut
from lit_prune.structure.counting import unique_labels
from lit_prune.structure.coupling import names_of, per_unit, view


class DeviationPruning(PruningCallback):
    """Ranks columns by their norm times the standard deviation of their inputs.

    Args:
        power: Exponent of the deviation.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "deviation"

    def __init__(self, power: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.power = power

    @property
    def columns(self) -> ColumnScore:
        """All that the method is."""
        return self._score

    def _score(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        return weight.float().norm(dim=0) * statistics.variance.sqrt() ** self.power


class OneCut(Callback):
    """Does without the base class: scores, allocation and cut by hand.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
    """

    def __init__(self, sparsity: float = 0.1) -> None:
        self.sparsity = sparsity

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Prune a dense model."""
        if pl_module.phase == "dense":
            pl_module.recut(trainer, lambda: self.prune(pl_module.model, pl_module.structure))

    @torch.no_grad()
    def prune(self, model: Any, structure: Any) -> Layout:
        """Cut the smallest channels of the whole model."""
        scores: dict[str, list[Tensor]] = {"channel": []}
        for layer in range(len(structure.widths.layers)):
            names = names_of(model, structure, layer)
            rows = view(
                model, structure, layer, {name: model.get_parameter(name) for name in names}
            )
            scores["channel"].append(magnitude(per_unit(rows, "channel"), "l1"))
        labels = unique_labels(model, structure)
        plan = ranked(scores, labels, structure.widths, self.sparsity, ["channel"])
        layout = kept_units(plan, scores, structure.widths)
        cut(model, structure, layout)
        return layout
