"""Repair without training: Gram matrices of activations and least squares."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.modes import exact_products
from lit_prune.notes import note

#: How often the ridge is raised tenfold before a Gram matrix is given up.
_ATTEMPTS = 6


class Gram:
    """Running sum of X Xᵀ over calibration tokens, in float32.

    Args:
        size: Number of features.
        device: Where to keep it.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        # not the default dtype, which a bf16-true trainer sets
        self.matrix = torch.zeros(size, size, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add activations [tokens, features]."""
        with exact_products(x.dtype):
            x = x.float()
            self.matrix.addmm_(x.T, x)

    def norms(self) -> Tensor:
        """Euclidean norm of each feature over the tokens, [features]."""
        return self.matrix.diagonal().clamp(min=0).sqrt()


def least_squares(
    weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    *,
    ridge: Literal["weights", "zero"] = "weights",
    delta: float = 1e-3,
    place: str = "",
) -> Tensor:
    """The kept columns of a matrix, changed so that its output stays as close as can be.

    With M the kept and P the removed columns::

        weights: W*_M = W_M + W_P X_P X_Mᵀ (X_M X_Mᵀ + δI)⁻¹
        zero:    W*_M = W X X_Mᵀ (X_M X_Mᵀ + δI)⁻¹

    The two agree at δ = 0; the first changes nothing when nothing is cut. δ is relative to the mean
    diagonal, and is raised tenfold while the matrix is not positive definite, which is noted.

    Source: "FASP: Fast and Accurate Structured Pruning of Large Language Models", equation 8
    (``zero``).

    Args:
        weight: W, [outputs, inputs].
        gram: X Xᵀ over the calibration tokens, [inputs, inputs], float32.
        keep: M, ascending, [kept].
        ridge: What the solution shrinks towards: the kept weights, or zero.
        delta: δ in units of the mean diagonal of X_M X_Mᵀ.
        place: The matrix' name, for messages.

    Returns:
        W*_M, [outputs, kept], float32.

    Raises:
        UserError: The matrix is not positive definite with any δ tried.
    """
    weight = weight.float()
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[keep] = False
    rows = removed.nonzero().flatten() if ridge == "weights" else torch.arange(weight.shape[1])
    rows = rows.to(weight.device)
    base = weight[:, keep] if ridge == "weights" else torch.zeros_like(weight[:, keep])
    if not len(rows):
        return base
    with exact_products(torch.float32):
        factor = _cholesky(gram[keep][:, keep], delta, place)
        cross = gram[keep][:, rows]
        if len(rows) <= weight.shape[0]:  # solve for whichever right side is narrower
            change = weight[:, rows] @ torch.cholesky_solve(cross, factor).T
        else:
            change = torch.cholesky_solve(cross @ weight[:, rows].T, factor).T
    return base + change


def _cholesky(matrix: Tensor, delta: float, place: str) -> Tensor:
    where = f" at the input of {place}" if place else ""
    mean = matrix.diagonal().mean()
    identity = torch.arange(len(matrix), device=matrix.device)
    for attempt in range(_ATTEMPTS):
        damped = matrix.clone()
        damped[identity, identity] += mean * delta * 10**attempt
        factor, info = torch.linalg.cholesky_ex(damped)
        if not info.item():
            if attempt:
                note(
                    f"calibration statistics{where} are not positive definite with delta "
                    f"{delta:g}; least squares took {delta * 10**attempt:g} there"
                )
            return factor
    raise UserError(
        f"expected calibration statistics to be positive definite with a ridge of up to "
        f"{delta * 10 ** (_ATTEMPTS - 1):g} of their mean diagonal, got a matrix that is not"
        f"{where}; use more calibration samples or a larger delta"
    )
