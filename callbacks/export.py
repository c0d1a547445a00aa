"""The result: a plain Hugging Face checkpoint with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_prune.export import check_destination
from lit_prune.export.describe import card_of
from lit_prune.loading import opening
from lit_prune.prunable import require


class ExportCheckpoint(Callback):
    """Merges adapters and writes the checkpoint when the fit ends; list it last.

    The folder gets its name when all of it is written: one that is there is complete. A fit that
    was stopped after its last step, or had ended, writes it again when it is resumed.

    Args:
        folder: Where, under the run's folder.
    """

    def __init__(self, folder: str = "pruned") -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse what would fail only after hours of work.

        Raises:
            UserError: The module has no model to export, or the place holds something else.
        """
        if stage == "fit":
            require(pl_module, self)
        if stage == "fit" and trainer.is_global_zero:
            check_destination(Path(trainer.default_root_dir) / self.folder)

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a model that can't be exported, before it is cut as the fit starts."""
        opening.check_class(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse it before it is trained, too."""
        opening.check_class(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write it; a fit that had ended before, and is resumed, writes it again."""
        pl_module.finish()
        if trainer.is_global_zero:
            out = Path(trainer.default_root_dir) / self.folder
            pl_module.export(out, card_of(pl_module, out.name))
        trainer.strategy.barrier("export")
