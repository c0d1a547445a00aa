"""Going on with a fit after its model has changed shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Trainer

T = TypeVar("T")


def refit(trainer: Trainer, change: Callable[[], T]) -> T:
    """Change the fitted module's parameters, then set up anew what holds on to them.

    The DDP wrapper, its buckets, the optimizers and the schedules are made again; the step counter,
    loggers and the progress bar go on. Not to be called within an accumulation window.

    Args:
        trainer: The trainer, in a fit.
        change: Replaces, adds or freezes parameters of the trainer's module.

    Returns:
        What `change` returns.
    """
    strategy = trainer.strategy
    strategy.model = strategy.lightning_module  # drops a DDP wrapper
    with (
        torch.inference_mode(False),
        trainer.precision_plugin.module_init_context(),
        strategy.root_device,
    ):
        result = change()
    strategy.model_to_device()
    if hasattr(strategy, "configure_ddp"):
        cast(Any, strategy).configure_ddp()  # new parameters, new buckets
    strategy.setup_optimizers(trainer)
    strategy.setup_precision_plugin()
    return result
