"""Statistics of the inputs of modules over calibration tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.restoration.least_squares import Gram

Reduce = Callable[[Tensor], Tensor]


class InputStatistics:
    """Mean and variance of each input feature, and the Gram matrix where one is asked for.

    Variances are joined batch by batch from centred sums (Chan et al., 1979), so that features
    with a large mean keep theirs in float32.

    Args:
        size: Number of features.
        device: Where to keep them.
        gram: Whether to keep X Xᵀ, too.
    """

    def __init__(self, size: int, device: torch.device | str, *, gram: bool = False) -> None:
        self.tokens = 0
        self._mean = torch.zeros(size, dtype=torch.float32, device=device)
        self._squares = torch.zeros_like(self._mean)
        self.gram = Gram(size, device) if gram else None

    def add(self, x: Tensor) -> None:
        """Add activations [tokens, features], or none of them if memory runs out."""
        if not len(x):
            return
        variance, mean = torch.var_mean(x.float(), dim=0, correction=0)
        total = self.tokens + len(x)
        step = mean - self._mean
        change = step * (len(x) / total)
        spread = variance * len(x) + step.square() * (self.tokens * len(x) / total)
        if self.gram is not None:
            self.gram.add(x)  # the last that takes memory
        self._mean += change
        self._squares += spread
        self.tokens = total

    def reduce(self, add: Reduce) -> None:
        """Join with what the other processes have seen.

        Args:
            add: Sums a tensor over processes.
        """
        if self.gram is not None:
            self.gram.matrix = add(self.gram.matrix)
        own = self.tokens
        self.tokens = int(add(torch.tensor(own, device=self._mean.device)))
        mean = add(self._mean * own) / max(self.tokens, 1)
        self._squares = add(self._squares + own * (self._mean - mean).square())
        self._mean = mean

    @property
    def mean(self) -> Tensor:
        """Mean of each feature, [features]."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Variance of each feature over the tokens, with their number as divisor, [features]."""
        return self._squares / max(self.tokens, 1)

    def norms(self) -> Tensor:
        """Euclidean norm of each feature over the tokens, [features]."""
        if self.gram is not None:
            return self.gram.norms()
        return (self._squares + self.tokens * self._mean.square()).sqrt()


def require_finite(values: Tensor, what: str, place: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: There is one.
    """
    if not torch.isfinite(values).all():
        raise UserError(
            f"expected finite {what}, got NaN or infinity {place}; check the model's weights, or "
            f"use --model.dtype float32"
        )
