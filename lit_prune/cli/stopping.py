"""What SIGTERM does to a fit: a checkpoint after the optimizer step, then the end."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_prune.cli.guard import TERMINATED, Terminated, termination


class StopWhenTerminated(Callback):
    """Saves after the step during which SIGTERM came to any process, and stops all of them.

    Before training there is nothing to save, and afterwards everything is saved: there the command
    ends at once. Lightning's own handler lets processes exchange tensors in the middle of whatever
    else they are exchanging, and saves nothing; this one takes its place while training lasts. List
    it behind everything that changes the model.

    Args:
        path: The checkpoint to write; None stops without one.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stops = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal back from Lightning, and have it wait."""
        termination.arm()
        termination.deferred = self.path is not None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save if a process was asked to stop and no gradients wait for more."""
        if not trainer.fit_loop._should_accumulate():
            self._save_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Stop here, where the saved step is also logged."""
        self._stop_if_saved()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here, if validation follows the saved step."""
        self._stop_if_saved()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the long work that needs no training, which a resumed run repeats."""
        if not self._stops:
            self._save_if_asked(trainer)
        termination.deferred = False
        self._stop_if_saved()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the processes that Lightning has started, too."""
        termination.deferred = False
        launcher = trainer.strategy.launcher
        if isinstance(exception, Terminated) and launcher is not None:
            launcher.kill(signal.SIGTERM)

    def _save_if_asked(self, trainer: Trainer) -> None:
        if self.path is None:
            return
        if trainer.strategy.reduce_boolean_decision(termination.asked, all=False):
            trainer.save_checkpoint(self.path)
            self._stops = True

    def _stop_if_saved(self) -> None:
        if self._stops:
            raise Terminated(TERMINATED)
