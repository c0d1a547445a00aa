"""The variational information bottleneck's formulas: what a mask's mean and variance say of a unit.

A unit is multiplied by z = mu + sigma * eta with eta ~ N(0, 1) while masks are trained; the ratio
alpha = mu^2 / sigma^2 then says how much of the unit gets through the noise.

Source: "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted Inference",
equations 1 to 3 and section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

#: Keeps the logarithm of a squared mean finite.
EPSILON = 1e-8

#: How fast a unit's soft keep goes from 0 to 1 around log alpha = 0.
_SHARPNESS = 10.0

#: Units of LLaMA-7B, for which the weights of the KL term were chosen: 32 layers of 32 heads and
#: 11008 channels, and 4096 residual features.
_LAYERS_7B = 32
_UNITS_7B = {"group": 32 * 32, "channel": 32 * 11008, "hidden": 4096}


def log_alpha(mu: Tensor, log_variance: Tensor) -> Tensor:
    """log(mu^2 + epsilon) - log sigma^2 of each unit; units with the lowest go first.

    Args:
        mu: Means [units].
        log_variance: log sigma^2 [units].
    """
    return (mu.square() + EPSILON).log() - log_variance


def kl_divergence(mu: Tensor, log_variance: Tensor) -> Tensor:
    """The bottleneck's price of each unit, log(1 + mu^2 / sigma^2) / 2 (equation 1).

    Args:
        mu: Means [units].
        log_variance: log sigma^2 [units].
    """
    return torch.log1p(mu.square() * (-log_variance).exp()) / 2


def soft_keep(ratios: Tensor) -> Tensor:
    """How far a unit is kept, between 0 and 1 and differentiable: sigmoid(10 log alpha).

    Args:
        ratios: log alpha [units].
    """
    return torch.sigmoid(_SHARPNESS * ratios)


def sparsity_penalty(sparsity: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """lambda_1 (s - t) + lambda_2 (s - t)^2, of which the multipliers seek the maximum.

    Below the target lambda_1 falls below 0 and lambda_2 rises, so that the descent over the masks
    raises the sparsity.

    Args:
        sparsity: Expected sparsity s [].
        target: Target t.
        linear: lambda_1 [].
        quadratic: lambda_2 [].
    """
    excess = sparsity - target
    return linear * excess + quadratic * excess.square()


def kl_weights(
    units: Mapping[str, int], layers: int, target: float, scale: float | Literal["auto"] = "auto"
) -> dict[str, float]:
    """What a unit's KL divergence weighs in the loss.

    The weights are 1e-6 times 256 for a KV group (512 for targets above 0.6), 1 for a channel and
    2 layers + 30 for a residual feature. They were chosen for LLaMA-7B; ``auto`` gives each axis
    in all the weight that it has there, however few units it has here.

    Args:
        units: Number of masked units of each axis, in all layers.
        layers: Decoder layers of the model.
        target: Target sparsity.
        scale: A factor on the weights, or ``auto``.

    Returns:
        The weight of each axis in `units`.
    """
    depth = _LAYERS_7B if scale == "auto" else layers
    weights = {
        "group": (512 if _above(target, 0.6) else 256) * 1e-6,
        "channel": 1e-6,
        "hidden": (2 * depth + 30) * 1e-6,
    }
    return {
        axis: weights[axis] * (_UNITS_7B[axis] / number if scale == "auto" else scale)
        for axis, number in units.items()
    }


def target_at(step: int, steps: int, target: float) -> float:
    """The target in a step of the mask training: it rises linearly from 0, then stays.

    Args:
        step: The step, from 0.
        steps: All steps; the rise takes 10 % of them, or 20 % for targets above 0.6.
        target: The final target.
    """
    rise = steps * (0.2 if _above(target, 0.6) else 0.1)
    return target * min(step / rise, 1.0) if rise else target


def default_rate(target: float) -> float:
    """The learning rate of mu and log sigma^2: 0.05, or 0.1 for targets above 0.5."""
    return 0.1 if _above(target, 0.5) else 0.05


def _above(target: float, limit: float) -> bool:
    """Targets are counted back from parameters, and one of 0.6 is not 0.6 to the last bit."""
    return target > limit + 1e-6
