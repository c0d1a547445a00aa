"""Fisher information of gates at the inputs of the modules that read units."""

from __future__ import annotations

import torch
from torch import Tensor


def entry_fisher(activations: Tensor, gradients: Tensor) -> Tensor:
    """Squared slope of the loss along a gate on each feature, token by token.

    F_j = sum_t (a_tj * ∂L/∂a_tj)²: with the loss summed over tokens, the diagonal of the empirical
    Fisher information of gates g at g = 1 in a_tj g_tj. A unit's score is the sum over its entries.

    Source: our own; "Importance Estimation for Neural Network Pruning" squares the like per sample.

    Args:
        activations: a, what a module reads, [tokens, features].
        gradients: Their gradients of the loss summed over tokens, [tokens, features].

    Returns:
        [features], float32; the lowest go first.
    """
    return torch.mul(activations.float(), gradients.float()).square_().sum(0)
