"""Recovery: LoRA on what is left of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer

from lit_prune.errors import UserError


class LoRARecovery(Callback):
    """Attaches LoRA once the model is pruned; it is merged in float32 at the end of the fit.

    List it behind the pruning callback. Without one it trains the dense model.

    Args:
        rank: Rank of every adapter.
        alpha: Scale of an adapter times its rank.
        dropout: Dropout before an adapter.
        targets: Names of the modules that get one, such as ``q_proj``; empty for every linear
            module of the decoder layers.
        dtype: The adapters' dtype, ``auto`` for the model's.
        seed: Seed of their initial values.
    """

    is_recovery = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Sequence[str] = (),
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        seed: int = 0,
    ) -> None:
        self.options = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": list(targets),
            "dtype": dtype,
            "seed": seed,
        }
        self._start: float | None = None

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse options that would fail only after a long pruning."""
        if pl_module.phase == "dense":
            pl_module.check_adapter(**self.options)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Attach the adapters, unless the fit resumes with them or does not train at all."""
        if pl_module.phase == "done" and not pl_module.resumed:
            raise UserError("expected a model to train, got a finished one; make a new module")
        if pl_module.phase in {"dense", "pruned"} and not trainer.fit_loop.skip:
            pl_module.recut(trainer, lambda: pl_module.attach_adapter(**self.options))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter() - pl_module.seconds.get("recover", 0.0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Read the clock, so that a resumed fit counts on from here."""
        if self._start is not None:
            pl_module.seconds["recover"] = time.perf_counter() - self._start

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.on_save_checkpoint(trainer, pl_module, None)
        self._start = None
