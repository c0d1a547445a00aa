"""Magnitude pruning: units by the norm of their weights."""

from __future__ import annotations

from typing import Any, Literal

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.errors import require_one_of
from lit_prune.pruning import PruningCallback
from lit_prune.scores.magnitude import magnitude
from lit_prune.structure.coupling import names_of, per_unit, view

Norm = Literal["l1", "l2"]


class MagnitudePruning(PruningCallback):
    """Prunes the units whose coupled weights are smallest; no calibration token is looked at.

    Source: "LLM-Pruner: On the Structural Pruning of Large Language Models", magnitude criteria.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        norm: ``l1``, the sum of absolute values, or ``l2``, the root of the sum of squares.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "magnitude"
    by_layer = True
    looks_at = "nothing"

    def __init__(self, sparsity: float = 0.2, norm: Norm = "l2", **options: Any) -> None:
        super().__init__(sparsity=sparsity, **options)
        require_one_of("norm", norm, Norm)
        self.norm: Norm = norm

    def score(self, calibration: Calibration) -> Scores:
        """The norm of what each unit owns.

        Args:
            calibration: The model.
        """
        model, structure = calibration.model, calibration.structure
        scores: Scores = {axis: [] for axis in calibration.axes}
        for layer in calibration.layers():
            names = names_of(model, structure, layer)
            weights = {name: model.get_parameter(name).detach() for name in names}
            rows = view(model, structure, layer, weights)
            for axis in calibration.axes:
                scores[axis].append(magnitude(per_unit(rows, axis), self.norm).cpu())
        return scores

    def options(self) -> dict[str, Any]:
        """What was asked for, for reports."""
        return super().options() | {"norm": self.norm}
