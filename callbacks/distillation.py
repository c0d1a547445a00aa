"""Recovery: the dense model as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune.errors import UserError, require_unused
from lit_prune.prunable import require
from lit_prune.recovery.distillation import distillation_loss
from lit_prune.recovery.hidden import HiddenStates, hidden_loss, matching_layers
from lit_prune.recovery.quantized import Precision, check_precision


class Distillation(Callback):
    """Trains towards the dense model's logits and hidden states, computed in the same step.

    Source: TVA-Prune, "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted
    Inference", section 3.3 (MSE of the logits); KL divergence as an alternative.

    Args:
        task: Weight of the next-token cross-entropy.
        kl: Weight of the KL divergence from the teacher.
        mse: Weight of the mean squared difference of the logits.
        temperature: Temperature of the KL divergence.
        hidden: Weight of the mean squared difference of what matching layers give: a layer that
            is left is compared with itself in the dense model, on the features that are left.
        hidden_every: 1 to match all layers, k for the k-th, 2k-th and so on of those left.
        teacher: How the teacher's layers are held: ``8bit`` or ``4bit`` (bitsandbytes) for less
            memory.
    """

    is_recovery = True

    def __init__(
        self,
        task: float = 1.0,
        kl: float = 1.0,
        mse: float = 0.0,
        temperature: float = 1.0,
        hidden: float = 0.0,
        hidden_every: int = 1,
        teacher: Precision = "dense",
    ) -> None:
        weights = (task, kl, mse, hidden)
        if min(weights) < 0 or max(weights) == 0:
            raise UserError(
                "expected weights of at least 0, one of them above, got "
                f"task {task:g}, kl {kl:g}, mse {mse:g}, hidden {hidden:g}"
            )
        if not temperature > 0:
            raise UserError(f"expected a temperature above 0, got {temperature:g}")
        if hidden_every < 1:
            raise UserError(f"expected hidden_every of at least 1, got {hidden_every}")
        if not kl:
            require_unused(Distillation, "a kl above 0", temperature=temperature)
        if not hidden:
            require_unused(Distillation, "a weight hidden above 0", hidden_every=hidden_every)
        self.weights = {
            "task_weight": task,
            "kl_weight": kl,
            "mse_weight": mse,
            "temperature": temperature,
        }
        self.hidden, self.hidden_every = hidden, hidden_every
        self.teacher: Precision = teacher
        self._student: HiddenStates | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module to keep the dense model when it is cut.

        Raises:
            UserError: The module is none that can be cut, or bitsandbytes is needed for the teacher
                and not installed.
        """
        if stage == "fit":
            require(pl_module, self)
            check_precision(self.teacher)
            pl_module.keep_teacher, pl_module.teacher_precision = True, self.teacher

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Bring the teacher to the device, and put this loss in place.

        Raises:
            UserError: More layers are to be skipped than are left.
        """
        pl_module.require_teacher(self.teacher)
        if self.hidden and not matching_layers(pl_module.layout, self.hidden_every):
            raise UserError(
                f"expected hidden_every of at most {len(pl_module.layout.layers)}, the layers "
                f"that are left, got {self.hidden_every}"
            )
        pl_module.loss_term = self

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Have the student's hidden states recorded."""
        self._forget()
        if self.hidden and pl_module.loss_term is self:  # not while masks are trained
            self._student = self._record(pl_module, pl_module.model, 0)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the loss back."""
        self._forget()
        pl_module.loss_term = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave neither the loss nor hooks to a module whose fit is broken off."""
        self.on_train_end(trainer, pl_module)

    def _forget(self) -> None:
        """Record the student no longer, where no loss was asked for."""
        if self._student is not None:
            self._student.close()
        self._student = None

    def _record(self, pl_module: Any, model: Any, side: int) -> HiddenStates:
        """Record the layers that match; `side` is 0 for the student, 1 for the teacher."""
        layers = pl_module.structure.layers(model)
        pairs = matching_layers(pl_module.layout, self.hidden_every)
        return HiddenStates([layers[pair[side]] for pair in pairs])

    def __call__(self, pl_module: Any, batch: Mapping[str, Tensor], output: Any) -> Tensor:
        """The distillation loss of a batch, [].

        Args:
            pl_module: The module, with its teacher.
            batch: `input_ids`, `attention_mask` and `labels`, [batch, tokens].
            output: The student's output.
        """
        student, self._student = self._student, None
        states = None if student is None else student.take()
        dense = None if student is None else self._record(pl_module, pl_module.teacher, 1)
        try:
            with torch.no_grad():
                teacher = pl_module.teacher(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    use_cache=False,
                )
        finally:
            if dense is not None:
                dense.close()
        losses = distillation_loss(output.logits, teacher.logits, batch["labels"], **self.weights)
        total = losses.pop("total")
        if states is not None and dense is not None:
            apart = hidden_loss(states, dense.take(), batch["labels"], pl_module.layout)
            losses["hidden"], total = apart, total + self.hidden * apart
        for name, value in losses.items():
            pl_module.log(f"train/{name}", value.detach())
        return total
