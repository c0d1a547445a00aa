"""Going on with a fit after its model has changed shape."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy

from lit_prune.cutting.wholeness import changing, require_whole
from lit_prune.errors import UserError
from lit_prune.fitting.ranks import require_same
from lit_prune.fitting.sharding import ShardedStrategy
from lit_prune.recovery import teacher
from lit_prune.structure import Layout, settle

T = TypeVar("T")

#: The strategies that a model can change its shape under, and subclasses of them that are others.
STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)
_OTHERS = (DeepSpeedStrategy, XLAStrategy, SingleDeviceXLAStrategy)


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
    check_strategy(type(trainer.strategy))
    if accumulating(trainer):
        raise UserError(
            "expected a cut after an optimizer step, got one while gradients are accumulated; cut "
            "when trainer.global_step has just risen"
        )
    strategy: Any = trainer.strategy
    with whole(trainer):
        strategy.model = strategy.lightning_module  # drops a DDP wrapper
        with (
            torch.inference_mode(False),
            trainer.precision_plugin.module_init_context(),
            strategy.root_device,
        ):
            result = change()
        strategy.model_to_device()
        if hasattr(strategy, "configure_ddp"):
            strategy.configure_ddp()  # new parameters, new buckets
        strategy.setup_optimizers(trainer)
        strategy.setup_precision_plugin()
    return result


def check_strategy(kind: type) -> None:
    """Refuse a strategy under which a model can't change its shape.

    Args:
        kind: Its class.

    Raises:
        UserError: It is such a one.
    """
    if not issubclass(kind, STRATEGIES) or issubclass(kind, _OTHERS):
        raise UserError(
            "expected one device, or the strategy ddp or fsdp2, for a model that changes its "
            f"shape, got {kind.__name__}; use --trainer.strategy ddp, or fsdp2 to divide the model "
            "over the devices"
        )


def whole(trainer: Trainer) -> AbstractContextManager[None]:
    """A context in which every process has the whole model, as an ordinary one.

    It matters under ``fsdp2``, where a model that is divided can neither be copied nor be run on
    numbers of batches that differ between processes.
    """
    strategy = trainer.strategy
    return strategy.whole() if isinstance(strategy, ShardedStrategy) else nullcontext()


def accumulating(trainer: Trainer) -> bool:
    """Whether the last batch's gradients wait for those of the next one."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop.batch_progress.current.ready) and loop._should_accumulate()


def recut(module: Any, trainer: Trainer, change: Callable[[], Layout | None]) -> None:
    """Change a `Prunable`'s shape in the middle of a fit; see its method of this name."""
    require_whole(module.model)
    with whole(trainer):
        _tell(module, trainer, "on_before_cut")
        teacher.keep(module)
        module.first_step = trainer.global_step
        if refit(trainer, lambda: _change(module, trainer, change)):
            _tell(module, trainer, "on_after_cut")


def _change(module: Any, trainer: Trainer, change: Callable[[], Layout | None]) -> bool:
    start = time.perf_counter()
    dense = module._outside.setdefault("config", copy.deepcopy(module.model.config))
    with changing(module.model):
        layout = change()
        if layout is None:
            return False
        require_same(trainer.strategy, layout)
        module.layout = module.layout.then(layout)
        module.is_stock = settle(module.model, module.structure, module.layout, dense)
    module.phase = "pruned"
    before = module.seconds.get("calibrate_and_prune", 0.0)
    module.seconds["calibrate_and_prune"] = before + time.perf_counter() - start
    return True


def _tell(module: Any, trainer: Trainer, event: str) -> None:
    for callback in cast(Any, trainer).callbacks:
        if hasattr(callback, event):
            getattr(callback, event)(trainer, module)
