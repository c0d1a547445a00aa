"""The fluctuation score of FLAP."""

from __future__ import annotations

import torch
from torch import Tensor


def fluctuation(weight: Tensor, variance: Tensor) -> Tensor:
    """Score the columns of a matrix by how much what they carry fluctuates.

    S_j = var(X_j) * sum_i W_ij²: what is lost when column j is replaced by its mean output.

    Source: "Fluctuation-based Adaptive Structured Pruning for Large Language Models", "weighted
    input feature variance".

    Args:
        weight: [outputs, inputs].
        variance: Variance of each input feature over the calibration tokens, [inputs].

    Returns:
        [inputs], float32; the lowest go first.
    """
    return variance.float() * weight.float().square().sum(0)


def standardised(columns: Tensor, *, squared: bool = False) -> Tensor:
    """Make the scores of one layer's columns comparable with those of others.

    A unit's score is then the mean over its columns.

    Source: "Fluctuation-based Adaptive Structured Pruning for Large Language Models", the
    adaptive search over the structure; the squares for heads are from the authors' code.

    Args:
        columns: As of `fluctuation`, [inputs].
        squared: Square them first.

    Returns:
        Mean 0 and standard deviation 1 (over n - 1), or all 0 where there is no difference;
        [inputs].
    """
    values = columns.square() if squared else columns
    centred = values - values.mean()
    if len(values) < 2:
        return centred
    deviation = centred.std()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))
