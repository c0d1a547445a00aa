"""The progress bar of a fit."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class FitBar(RichProgressBar):
    """Lightning's bar, but it ends with training, before results are printed."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw it for the last time."""
        super().on_train_end(trainer, pl_module)
        self._stop_progress()

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs in (None, -1):  # a number of steps was asked for
            return f"Epoch {current_epoch}"
        return super()._get_train_description(current_epoch)


def add_bar(config: dict[str, Any], callbacks: list[Callback]) -> None:
    """List it unless there is to be none, or another one.

    Args:
        config: Arguments of the Trainer.
        callbacks: Those that are listed beside the configuration's.
    """
    own = config["callbacks"] or []
    shown = config.get("enable_progress_bar") is not False and not config.get("barebones")
    if shown and not any(isinstance(callback, ProgressBar) for callback in [*own, *callbacks]):
        config["callbacks"] = [*own, FitBar()]
