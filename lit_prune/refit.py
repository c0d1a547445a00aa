"""Going on with a fit after its model has changed shape."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_prune import teacher
from lit_prune.errors import UserError
from lit_prune.structure import Layout, settle

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
    if accumulating(trainer):
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


def accumulating(trainer: Trainer) -> bool:
    """Whether the last batch's gradients wait for those of the next one."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop.batch_progress.current.ready) and loop._should_accumulate()


def recut(module: Any, trainer: Trainer, change: Callable[[], Layout | None]) -> None:
    """Change a `PrunableLM`'s shape in the middle of a fit; see its method of this name."""
    _tell(module, trainer, "on_before_cut")
    teacher.keep(module)
    module.first_step = trainer.global_step
    if refit(trainer, lambda: _change(module, change)):
        _tell(module, trainer, "on_after_cut")


def _change(module: Any, change: Callable[[], Layout | None]) -> bool:
    start = time.perf_counter()
    layout = change()
    if layout is None:
        return False
    module.is_stock = settle(module.model, module.structure, layout)
    module.layout = module.layout.then(layout)
    module.phase = "pruned"
    module.seconds["calibrate_and_prune"] = time.perf_counter() - start
    return True


def _tell(module: Any, trainer: Trainer, event: str) -> None:
    for callback in cast(Any, trainer).callbacks:
        if hasattr(callback, event):
            getattr(callback, event)(trainer, module)
