"""A callback for `kill_campaign.py`: says which phase a fit is in, and slows short ones down."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

_slow = {"calibration": False}


class PhaseMarks(Callback):
    """Appends a line to a file when a fit enters a phase or a step: the phase, step and time.

    List it first.

    Args:
        file: The file.
        masks: Whether masks are trained before the cut.
        pause: Seconds before a training step, and before a file or folder gets its final name; a
            fifth of it before each layer of the model while a cut is being prepared.
    """

    def __init__(self, file: str, masks: bool = False, pause: float = 0.05) -> None:
        self.file, self.masks, self.pause = Path(file), masks, pause
        self._unsaved = False

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Have files appear slowly."""
        for name in ("rename", "replace"):
            setattr(Path, name, _slowly(getattr(Path, name), self.pause))

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """A cut is prepared, or masks are; adapters come when no cut is ahead."""
        if not pl_module.pruning_ahead:
            return
        begins = self.masks and pl_module.gates is None
        self._mark(trainer, "mask learning" if begins else "calibration")
        _slow["calibration"] = True
        pause = self.pause / 5

        def wait(*_: Any) -> None:
            if _slow["calibration"]:
                time.sleep(pause)

        for layer in pl_module.structure.layers(pl_module.model):
            layer.register_forward_pre_hook(wait)

    def on_after_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """The cut model is in no checkpoint yet."""
        _slow["calibration"] = False
        self._unsaved = True
        self._mark(trainer, "cut")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """It will be when the next step begins."""
        self._unsaved = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        """A training step."""
        _slow["calibration"] = False
        if pl_module.gates is not None:
            phase = "mask learning"
        elif pl_module.phase == "dense":
            phase = "dense"
        elif self._unsaved:
            phase = "cut"
        else:
            phase = "between cuts" if pl_module.pruning_ahead else "recovery"
        self._mark(trainer, phase)
        time.sleep(self.pause)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Everything after training."""
        self._mark(trainer, "export")

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """The end."""
        self._mark(trainer, "done")

    def _mark(self, trainer: Trainer, phase: str) -> None:
        if trainer.is_global_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{phase}\t{trainer.global_step}\t{time.time()}\n")


def _slowly(action: Any, pause: float) -> Any:
    def slow(*args: Any) -> Any:
        time.sleep(pause)
        return action(*args)

    return slow
