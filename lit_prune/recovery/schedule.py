"""Optimizers and learning rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.errors import UserError, require_one_of
from lit_prune.recovery.quantized import bitsandbytes

OptimizerName = Literal["adamw", "adamw8bit"]
Shape = Literal["cosine", "linear", "constant"]


def check_settings(
    optimizer: str, schedule: str, *, lr: float, weight_decay: float, warmup: float
) -> None:
    """Refuse settings of the training that make no sense.

    Raises:
        UserError: One is out of range or unknown.
    """
    if not (lr >= 0 and weight_decay >= 0 and 0 <= warmup <= 1):
        raise UserError(
            "expected learning_rate and weight_decay of at least 0 and warmup from 0 to 1, got "
            f"{lr:g}, {weight_decay:g} and {warmup:g}"
        )
    require_one_of("optimizer", optimizer, OptimizerName)
    require_one_of("schedule", schedule, Shape)


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], **options: Any) -> Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), or that with moments in 8 bit.

    The moments of a parameter of fewer than 4,096 entries stay in 32 bit.

    Args:
        name: ``adamw`` or ``adamw8bit``.
        parameters: What is trained.
        options: `lr` and `weight_decay`.

    Raises:
        UserError: bitsandbytes is needed and not installed.
    """
    if name == "adamw8bit":
        return bitsandbytes().optim.AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, **options)


def optimization(module: Any) -> Any:
    """What `PrunableLM.configure_optimizers` gives: an optimizer and its schedule.

    Raises:
        UserError: The trainer's steps have no limit.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(module.optimizer_name, trained, **module.optimization)
    trainer = module.trainer
    steps = trainer.max_steps and trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise UserError(
            "expected --trainer.max_steps or --trainer.max_epochs, got neither: the learning "
            "rate's schedule has to know the number of steps"
        )
    left = max(int(steps) - module.first_step, 1)
    schedule = warmed_up(optimizer, left, module.warmup, module.schedule)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def warmed_up(optimizer: Optimizer, steps: int, warmup: float, shape: Shape = "cosine") -> LambdaLR:
    """A linear rise over the first share of the steps, then a fall to zero, or none.

    Args:
        optimizer: Its learning rates are the peak.
        steps: All steps.
        warmup: Share of them in which the rate rises.
        shape: How it falls: as a half ``cosine``, ``linear`` or not at all, ``constant``.
    """
    rise = max(round(steps * warmup), 1)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min((step - rise) / max(steps - rise, 1), 1.0)
        if shape == "constant":
            return 1.0
        return 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
