"""FASP: structured Wanda scores, coupled rows and columns, least-squares restoration."""

from __future__ import annotations

from typing import Any

from lit_prune.cutting.layerwise import ColumnScore, Repair
from lit_prune.pruning import PruningCallback
from lit_prune.scores.wanda import wanda_scores


class FASPPruning(PruningCallback):
    """Ranks columns by weights and activations, layer by layer, and restores those that stay.

    Each layer sees what the pruned layers before it give.

    Source: "FASP: Fast and Accurate Structured Pruning of Large Language Models".

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        restoration: What makes up for what goes; the paper's is ``least_squares`` with
            ``ridge: zero``.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "FASP"
    layerwise = True

    def __init__(
        self, sparsity: float = 0.2, restoration: Repair = "least_squares", **options: Any
    ) -> None:
        super().__init__(sparsity=sparsity, restoration=restoration, **options)

    @property
    def columns(self) -> ColumnScore:
        """The structured Wanda score."""
        return wanda_scores
