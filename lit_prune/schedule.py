"""Learning rate schedules."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, steps: int, warmup: float) -> LambdaLR:
    """A linear rise over the first share of the steps, then a cosine down to zero.

    Args:
        optimizer: Its learning rates are the peak.
        steps: All steps.
        warmup: Share of them in which the rate rises.
    """
    rise = max(round(steps * warmup), 1)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min((step - rise) / max(steps - rise, 1), 1.0)))

    return LambdaLR(optimizer, factor)
