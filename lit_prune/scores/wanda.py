"""The structured Wanda score that FASP ranks columns by."""

from __future__ import annotations

from torch import Tensor

from lit_prune.calibration.statistics import InputStatistics


def column_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Score the columns of a matrix by what they carry: S_j = ||X_j||_2 * sum_i |W_ij|.

    Source: "FASP: Fast and Accurate Structured Pruning of Large Language Models", section 3.2.

    Args:
        weight: [outputs, inputs].
        norms: Euclidean norm of each input feature over the calibration tokens, [inputs].

    Returns:
        [inputs], float32; the lowest go first.
    """
    return norms.float() * weight.float().abs().sum(0)


def wanda_scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """`column_scores` from statistics of the inputs, [inputs].

    Args:
        weight: [outputs, inputs].
        statistics: Of the inputs.
    """
    return column_scores(weight, statistics.norms())
