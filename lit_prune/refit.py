"""Going on with a fit after its model has changed shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_prune.errors import UserError

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

    Raises:
        UserError: The strategy can't do it, or gradients are being accumulated.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UserError(
            "expected one device or the ddp strategy for a model that changes its shape, got "
            f"{type(strategy).__name__}; use --trainer.strategy ddp"
        )
    loop = trainer.fit_loop
    if loop.epoch_loop.batch_progress.current.ready and loop._should_accumulate():
        raise UserError(
            "expected a cut after an optimizer step, got one while gradients are accumulated; cut "
            "when trainer.global_step has just risen"
        )
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
