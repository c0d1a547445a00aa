"""Least-squares unit tuning: one scale for each remaining head or channel of a block."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.modes import exact_products

#: A scale beyond this ends the tuning.
LIMIT = 10.0
#: δ: how strongly scales are drawn towards 1.
_DELTA = 0.01


def unit_scales(weight: Tensor, gram: Tensor, cross: Tensor, owners: Tensor) -> Tensor | None:
    """Scales of a block's units that bring its output closest to a target.

    A's columns are what the units put out, a_j = vec(X_j W_jᵀ), and m = 1 + r minimises::

        ‖A r + A 1 - b‖² + δ ‖r‖²        δ = 0.01 in units of the mean diagonal of AᵀA

    A has as many rows as there are tokens and outputs together and is never made: with the sums
    over the columns of W that units j and j' own::

        (AᵀA)_jj' = Σ (XᵀX) ∘ (WᵀW)        (Aᵀb)_j = Σ_i Σ_o (XᵀB)_io W_oi

    Memory: two [inputs, inputs] matrices in float32 beside the arguments.

    Source: "Efficient Pruning of Large Language Model with Adaptive Estimation Fusion", section
    3.3, equation 13.

    Args:
        weight: W, the block's last matrix, [outputs, inputs].
        gram: XᵀX over the calibration tokens, [inputs, inputs], float32.
        cross: XᵀB, with the target b without the block's bias, [inputs, outputs], float32.
        owners: The unit of each column of W, from 0 without gaps, [inputs].

    Returns:
        m, [units], float32, to be multiplied into the units' columns; None if a scale is beyond 10
        in magnitude: then the block's tuning is dropped, and so is that of all blocks after it.

    Raises:
        UserError: The statistics are not finite.
    """
    units = int(owners.max()) + 1
    owners = owners.to(weight.device)
    with exact_products(torch.float32):
        weight = weight.float()
        square = (weight.T @ weight).mul_(gram)
        target = (cross * weight.T).sum(1)
        if units < len(owners):
            square = _sum_rows(_sum_rows(square, owners, units).T, owners, units)
            target = _sum_rows(target, owners, units)
        rest = target - square.sum(1)
        if not (torch.isfinite(rest).all() and torch.isfinite(square).all()):
            raise UserError(
                "expected finite calibration activations for unit scales, got NaN or infinity; "
                "check the model's weights, or use --model.dtype float32"
            )
        # at least a whisper, where all units are silent
        ridge = (_DELTA * square.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
        square.diagonal().add_(ridge)
        try:
            scales = 1 + torch.linalg.solve(square, rest)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise UserError(
                "expected unit scales that statistics determine, got a singular matrix; use more "
                "calibration samples or another restoration"
            ) from error
    return scales if bool((scales.abs() <= LIMIT).all()) else None


def _sum_rows(matrix: Tensor, owners: Tensor, units: int) -> Tensor:
    return matrix.new_zeros(units, *matrix.shape[1:]).index_add_(0, owners, matrix)
