"""Wanda-sp: structured Wanda scores, nothing restored."""

from __future__ import annotations

from lit_prune.cutting.layerwise import ColumnScore
from lit_prune.pruning import PruningCallback
from lit_prune.scores.wanda import wanda_scores


class WandaPruning(PruningCallback):
    """Ranks columns by weights and activations, layer by layer; heads by the sum over theirs.

    Each layer sees what the pruned layers before it give, as in the authors' code.

    Source: "Wanda-sp", the structured form of "A Simple and Effective Pruning Approach for Large
    Language Models" that "Fluctuation-based Adaptive Structured Pruning for Large Language Models"
    compares with.

    All arguments are those of `lit_prune.pruning.PruningCallback`.
    """

    method = "Wanda-sp"
    layerwise = True

    @property
    def columns(self) -> ColumnScore:
        """The structured Wanda score."""
        return wanda_scores
