"""When a fit's model is cut: before training, in the middle of it, or again and again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.allocation.plan import TOLERANCE
from lit_prune.errors import UserError
from lit_prune.fitting.made_with import RemembersOptions, differences
from lit_prune.notes import noting, of_all
from lit_prune.prunable import Prunable, require
from lit_prune.structure import Layout
from lit_prune.structure.counting import count_actual


class CuttingCallback(RemembersOptions, Callback):
    """Cuts the module's model once or several times, and remembers how far it is.

    Args:
        start: Optimizer steps before the (first) cut.
        iterations: Number of cuts.
        every: Optimizer steps between cuts; 0 makes them one after the other.

    Raises:
        UserError: A number is out of range.
    """

    method = "cutting"

    def __init__(self, start: int = 0, iterations: int = 1, every: int = 0) -> None:
        if min(start, every) < 0 or iterations < 1:
            raise UserError(
                "expected start and every of at least 0 and iterations of at least 1, got "
                f"{start}, {every} and {iterations}"
            )
        if every and iterations == 1:
            raise UserError(
                f"expected every with several iterations, got every {every} and one cut; raise "
                "iterations or leave out every"
            )
        self.start, self.iterations, self.every = start, iterations, every
        self.sparsity = 0.0
        #: Cuts so far, whether the last was made, and what the model had before the first.
        self.iteration, self.finished = 0, False
        self.original: dict[str, int] = {}

    def restart(self) -> None:
        """Forget an earlier fit."""
        self.iteration, self.finished, self.original = 0, False, {}

    def prepare(self, trainer: Trainer, pl_module: Any) -> None:
        """Check what was asked before anything is done, and get ready."""

    def draw(self, trainer: Trainer) -> Any:
        """Get what the next cut needs of the data, before anything is changed or measured."""

    def cut(self, trainer: Trainer, pl_module: Any, drawn: Any) -> Layout:
        """Cut once; what stays, in the numbering of the model before.

        Args:
            trainer: The trainer.
            pl_module: The module, whose model is cut in place.
            drawn: What `draw` gave.
        """
        raise NotImplementedError(f"{type(self).__name__} does not cut")

    def is_last(self, reached: dict[str, float]) -> bool:
        """Whether the cut just made was the last one.

        Args:
            reached: Removed shares of the ``decoder``'s and of all (``total``) parameters.
        """
        return self.iteration >= self.iterations

    def goal(self, pl_module: Prunable) -> float:
        """Share of the decoder's original parameters to remove by the last cut."""
        return self.sparsity

    def options(self) -> dict[str, Any]:
        """What was asked for, as plain types, for reports."""
        if self.iterations == 1 and not self.start:
            return {}
        return {"start": self.start, "iterations": self.iterations, "every": self.every}

    @property
    def last_step(self) -> int:
        """Optimizer steps before the last cut."""
        return self.start + (self.iterations - 1) * self.every

    # --- Lightning -----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Start anew, and refuse a module whose model can't be cut.

        Raises:
            UserError: It can't, or another callback cuts it, too.
        """
        if stage != "fit":
            return
        require(pl_module, self)
        cutting = [c for c in cast(Any, trainer).callbacks if isinstance(c, CuttingCallback)]
        if len(cutting) > 1:
            names = " and ".join(type(callback).__name__ for callback in cutting)
            raise UserError(
                f"expected one pruning callback in a fit, got {names}; prune the export of a first "
                "fit in a second one"
            )
        self.restart()  # a checkpoint's state is loaded after this
        pl_module.resumed = False

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and what was asked for."""
        return {
            "method": self.method,
            "made_with": self.made_with,
            "iteration": self.iteration,
            "finished": self.finished,
            "original": dict(self.original),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.iteration, self.finished = state_dict["iteration"], state_dict["finished"]
        self.original = dict(state_dict["original"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Refuse a checkpoint that was made otherwise, if the fit is to go on from it.

        Also after the last cut, where they would change nothing but what is on record of the run.

        Raises:
            UserError: It is of another method, or of other options.
        """
        states = checkpoint["callbacks"]
        made_by = [found["method"] for found in states.values() if "made_with" in found]
        if trainer.state.fn != TrainerFn.FITTING or not made_by:
            return
        if self.state_key not in states:
            raise UserError(
                f"expected a checkpoint of {self.method}, got one of {made_by[0]}: go on with the "
                "callback it was made with, or start anew with --overwrite"
            )
        if changed := differences(states[self.state_key]["made_with"], self.made_with):
            raise UserError(
                f"expected a checkpoint of {self.method} with these options, got one with "
                f"{', '.join(changed)}: set them so, or start anew with --overwrite"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Cut if it is time, unless the fit resumes from after the last cut.

        Raises:
            UserError: The fit is too short, or the module was cut by another.
        """
        if not self.original and pl_module.phase != "dense":
            if not pl_module.resumed or not pl_module.history:
                raise UserError(
                    f"expected a dense model to prune, got one in phase {pl_module.phase!r}; list "
                    f"{type(self).__name__} before LoRARecovery, give each fit a new module, and "
                    "go on from a checkpoint of a fit that pruned"
                )
            self.finished = True
        pl_module.pruning_ahead = not self.finished
        if self.finished:
            return
        if 0 <= trainer.max_steps < self.last_step:
            raise self._too_short(trainer.max_steps)
        self.original = self.original or sizes_of(pl_module)
        self.prepare(trainer, pl_module)
        self._cut_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut if it is time."""
        if not self.finished and not trainer.fit_loop._should_accumulate():
            self._cut_if_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse to end before the last cut.

        Raises:
            UserError: The fit was too short.
        """
        if not self.finished and trainer.global_step < self.last_step:
            raise self._too_short(trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse to end before the last cut where nothing was trained at all.

        Raises:
            UserError: The fit had no step, as with ``max_epochs`` or ``limit_train_batches`` of 0.
        """
        if not self.finished:  # Lightning leaves out `on_train_end` then
            raise self._too_short(trainer.global_step)

    def _too_short(self, steps: int, also: str = "") -> UserError:
        return UserError(
            f"expected a fit of at least {self.last_step} steps, after which {self.method} makes "
            f"its last cut, got {steps}; raise trainer.max_steps, or what else ends it "
            f"sooner{also}"
        )

    def _cut_if_due(self, trainer: Trainer, pl_module: Any) -> None:
        while not self.finished and trainer.global_step >= self.start + self.iteration * self.every:
            drawn = self.draw(trainer)
            pl_module.recut(trainer, partial(self._cut, trainer, pl_module, drawn))

    def _cut(self, trainer: Trainer, pl_module: Any, drawn: Any) -> Layout:
        with noting() as notes:
            layout = self.cut(trainer, pl_module, drawn)
        self.iteration += 1
        reached = {key: 1 - n / self.original[key] for key, n in sizes_of(pl_module).items()}
        self.finished = self.is_last(reached)
        pl_module.pruning_ahead = not self.finished
        self._record(trainer, pl_module, reached, of_all(notes, trainer))
        return layout

    def _record(
        self,
        trainer: Trainer,
        pl_module: Prunable,
        reached: dict[str, float],
        notes: Sequence[str] = (),
    ) -> None:
        """Write down what was done, and log it."""
        entry: dict[str, Any] = {
            "base": pl_module.pretrained,
            "method": self.method,
            "options": self.options(),
            "sparsity": {"target": self.goal(pl_module), **reached},
            # so that the same model, and no other of its name, is compared with later
            "base_local": os.path.exists(os.path.expanduser(pl_module.pretrained)),
            "base_digest": pl_module._outside.get("digest"),
        }
        before = pl_module.history[-1].get("warnings", []) if self.iteration > 1 else []
        if notes or before:
            entry["warnings"] = list(dict.fromkeys([*before, *notes]))
        self._warn_of_miss(entry["sparsity"])
        if self.iteration > 1:
            pl_module.history[-1] = entry
        else:
            pl_module.history.append(entry)
        present = float(sizes_of(pl_module)["total"])
        metrics = {"prune/sparsity": reached["decoder"], "prune/parameters": present}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _warn_of_miss(self, sparsity: Mapping[str, float]) -> None:
        target, reached = sparsity["target"], sparsity["decoder"]
        if self.finished and abs(reached - target) > TOLERANCE:
            rank_zero_warn(
                f"expected to remove {target:.2%} of the decoder's parameters, {self.method} "
                f"removed {reached:.2%}; smaller multiples, or axes with smaller units, come nearer"
            )


def sizes_of(pl_module: Prunable) -> dict[str, int]:
    """Parameters of the decoder layers and of all (``total``)."""
    model, structure = pl_module.model, pl_module.structure
    return {
        "decoder": count_actual(model, structure, decoder=True),
        "total": count_actual(model, structure),
    }
