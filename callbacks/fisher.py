"""Fisher pruning: what the loss makes of gates at the inputs of the modules that read units."""

from __future__ import annotations

from typing import Any

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.cutting.layerwise import Repair
from lit_prune.methods.fisher import fisher_scores
from lit_prune.pruning import Allocation, PruningCallback


class FisherPruning(PruningCallback):
    """Prunes the units with the least Fisher information of gates on them, globally per parameter.

    It takes one backward pass for activations; weights get no gradient.

    Source: our own.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        allocation: As for `lit_prune.pruning.PruningCallback`.
        restoration: Likewise.
        batch_size: Windows whose activations and gradients are alive at once.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "Fisher"

    def __init__(
        self,
        sparsity: float = 0.2,
        allocation: Allocation = "global",
        restoration: Repair = "least_squares",
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            allocation=allocation,
            restoration=restoration,
            batch_size=batch_size,
            **options,
        )

    def score(self, calibration: Calibration) -> Scores:
        """Fisher information of each unit.

        Args:
            calibration: The model and its calibration tokens.
        """
        return fisher_scores(
            calibration.model,
            calibration.structure,
            calibration.batches,
            calibration.axes,
            reduce=calibration.ranks.reduce,
            track=calibration.track("gradients"),
        )
