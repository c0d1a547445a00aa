"""Taylor pruning: the four estimates of LLM-Pruner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.errors import require_one_of, require_unused
from lit_prune.methods.taylor import FisherScale, taylor_scores
from lit_prune.pruning import AxisName, PruningCallback
from lit_prune.scores.taylor import Reduction

Single = Literal["vector", "element1", "element2", "mixed"]


class TaylorPruning(PruningCallback):
    """Prunes the units whose removal changes the loss least by a Taylor estimate.

    Source: "LLM-Pruner: On the Structural Pruning of Large Language Models"; the formulas are in
    `lit_prune.scores.taylor`.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        estimate: ``vector`` (first order, summed over each row), ``element1`` (first order, entry
            by entry), ``element2`` (second order) or ``mixed`` (both orders).
        reduction: How the rows and columns of a unit are joined, by ``sum`` or ``max``.
        fisher_scale: Second-order terms as they are (``mean``), or times the ``tokens`` that a
            sample's loss is the mean of, which brings them to the scale of the first order.
        axes: What is cut.
        samples: Calibration windows.
        length: Tokens of a calibration window.
        batch_size: Windows whose gradient is taken at once; second-order terms are those of
            single samples only with 1.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "Taylor"

    def __init__(
        self,
        sparsity: float = 0.2,
        estimate: Single = "element1",
        reduction: Reduction = "sum",
        fisher_scale: FisherScale = "mean",
        axes: Sequence[AxisName] = ("group", "channel"),
        samples: int = 10,
        length: int = 128,
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            axes=axes,
            samples=samples,
            length=length,
            batch_size=batch_size,
            **options,
        )
        require_one_of("estimate", estimate, Single)
        require_one_of("reduction", reduction, Reduction)
        require_one_of("fisher_scale", fisher_scale, FisherScale)
        if estimate in ("vector", "element1"):
            needed = "an estimate that has second-order terms"
            require_unused(TaylorPruning, needed, fisher_scale=fisher_scale)
        self.estimate: Single = estimate
        self.reduction: Reduction = reduction
        self.fisher_scale: FisherScale = fisher_scale

    def score(self, calibration: Calibration) -> Scores:
        """The estimate, summed over each unit's rows and columns.

        Args:
            calibration: The model and its calibration tokens.
        """
        found = taylor_scores(
            calibration.model,
            calibration.structure,
            calibration.batches,
            [self.estimate],
            calibration.axes,
            reduction=self.reduction,
            fisher_scale=self.fisher_scale,
            reduce=calibration.ranks.reduce,
            track=calibration.track("gradients"),
        )
        return found[self.estimate]

    def options(self) -> dict[str, Any]:
        """What the method was asked for, as plain types, for reports."""
        own = {"estimate": self.estimate, "reduction": self.reduction}
        if self.estimate in ("element2", "mixed"):  # others have no second-order terms
            own["fisher_scale"] = self.fisher_scale
        return super().options() | own
