"""Random pruning, the baseline below all others."""

from __future__ import annotations

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.pruning import PruningCallback
from lit_prune.scores.random import random_scores, seed_of


class RandomPruning(PruningCallback):
    """Prunes units by chance: the same ones for a seed, on every process and device.

    All arguments are those of `lit_prune.pruning.PruningCallback`.
    """

    method = "random"
    by_layer = True
    looks_at = "nothing"

    def score(self, calibration: Calibration) -> Scores:
        """Numbers without meaning.

        Args:
            calibration: The model; no token is looked at.
        """
        seed = seed_of(calibration.seed, calibration.iteration)
        return random_scores(calibration.structure.widths, calibration.axes, seed)
