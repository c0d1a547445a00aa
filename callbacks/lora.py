"""Recovery: LoRA on what is left of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.errors import UserError
from lit_prune.fitting.made_with import differences
from lit_prune.fitting.refit import accumulating
from lit_prune.prunable import require
from lit_prune.recovery.quantized import Precision


class LoRARecovery(Callback):
    """Attaches LoRA once the model is pruned; it is merged in float32 at the end of the fit.

    List it behind the pruning callback. Without one it trains the dense model. Where pruning goes
    on during the fit it waits for the last cut.

    Args:
        rank: Rank of every adapter.
        alpha: Scale of an adapter times its rank.
        dropout: Dropout before an adapter.
        targets: Names of the modules that get one, such as ``q_proj``; empty for every linear
            module of the decoder layers.
        dtype: The adapters' dtype, ``auto`` for the model's.
        seed: Seed of their initial values.
        base: How the frozen weights under the adapters are held while they train: ``8bit`` and
            ``4bit`` (bitsandbytes) save memory of a GPU. The dense ones wait in the CPU's memory,
            and it is those that the adapters are merged into.
        adapter: Folder of a peft adapter to start from, whose rank, alpha and targets then count.
            It must fit the pruned model.
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
        base: Precision = "dense",
        adapter: str | None = None,
    ) -> None:
        self.options = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": list(targets),
            "dtype": dtype,
            "seed": seed,
            "base": base,
            "adapter": adapter,
        }
        self._start: float | None = None
        self._first_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module whose model can't have adapters."""
        if stage == "fit":
            require(pl_module, self)
            pl_module.resumed = False  # by an earlier fit; loading a checkpoint comes later
            self._first_step = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Leave out the optimizers of a fit that had no adapters yet: theirs begin anew."""
        cutting = [state for state in checkpoint["callbacks"].values() if "made_with" in state]
        done = pl_module.phase == "pruned" and all(state["finished"] for state in cutting)
        if trainer.state.fn == TrainerFn.FITTING and done:
            checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
            self._first_step = checkpoint["global_step"]

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse options that would fail only after a long pruning."""
        if pl_module.phase == "dense":
            pl_module.check_adapter(**self.options)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Attach the adapters, unless cuts are to come or the fit has them or does not train.

        Raises:
            UserError: The model is finished, an option is out of range, or the adapter to start
                from does not fit.
        """
        if pl_module.phase == "done" and not pl_module.resumed:
            raise UserError("expected a model to train, got a finished one; make a new module")
        if pl_module.resumed and pl_module.phase == "recovery":
            self._tell_of_changes(pl_module)
        if self._attach(trainer, pl_module) and self._first_step is not None:
            pl_module.first_step = self._first_step  # which the trainer learns later

    def _tell_of_changes(self, pl_module: Any) -> None:
        if self.options["adapter"] is None:  # else the shape is that of the saved one
            wanted = {name: value for name, value in self.options.items() if name != "adapter"}
            if wanted["dtype"] == "auto":
                wanted["dtype"] = str(pl_module.model.dtype).removeprefix("torch.")
            changed = differences(pl_module.adapter, wanted)
            if changed:
                rank_zero_warn(f"the checkpoint's adapters stay as they are: {', '.join(changed)}")

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        if not pl_module.pruning_ahead:
            self._start = time.perf_counter() - pl_module.seconds.get("recover", 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Attach the adapters after the last cut, if it was made during the fit."""
        if self._attach(trainer, pl_module):
            self.on_train_start(trainer, pl_module)

    def _attach(self, trainer: Trainer, pl_module: Any) -> bool:
        waits = pl_module.phase not in {"dense", "pruned"} or pl_module.pruning_ahead
        if waits or trainer.fit_loop.skip or accumulating(trainer):
            return False
        pl_module.recut(trainer, lambda: pl_module.attach_adapter(**self.options))
        return True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Read the clock, so that a resumed fit counts on from here."""
        if self._start is not None:
            pl_module.seconds["recover"] = time.perf_counter() - self._start

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.on_save_checkpoint(trainer, pl_module, None)
        self._start = None
