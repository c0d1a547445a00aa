"""Recovery: the dense model as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune.distillation import distillation_loss
from lit_prune.errors import UserError


class Distillation(Callback):
    """Trains towards the dense model's logits, computed in the same step.

    Source: TVA-Prune, "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted
    Inference", section 3.3 (MSE of the logits); KL divergence as an alternative.

    Args:
        task: Weight of the next-token cross-entropy.
        kl: Weight of the KL divergence from the teacher.
        mse: Weight of the mean squared difference of the logits.
        temperature: Temperature of the KL divergence.
    """

    is_recovery = True

    def __init__(
        self, task: float = 1.0, kl: float = 1.0, mse: float = 0.0, temperature: float = 1.0
    ) -> None:
        if min(task, kl, mse) < 0 or max(task, kl, mse) == 0:
            raise UserError(
                "expected weights of at least 0, one of them above, got "
                f"task {task:g}, kl {kl:g}, mse {mse:g}"
            )
        if not temperature > 0:
            raise UserError(f"expected a temperature above 0, got {temperature:g}")
        self.weights = {
            "task_weight": task,
            "kl_weight": kl,
            "mse_weight": mse,
            "temperature": temperature,
        }

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Ask the module to keep the dense model when it is cut."""
        if stage == "fit":
            pl_module.keep_teacher = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Bring the teacher to the device, and put this loss in place."""
        pl_module.require_teacher()
        pl_module.loss_term = self

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the loss back."""
        pl_module.loss_term = None

    def __call__(self, pl_module: Any, batch: Mapping[str, Tensor], output: Any) -> Tensor:
        """The distillation loss of a batch, [].

        Args:
            pl_module: The module, with its teacher.
            batch: `input_ids`, `attention_mask` and `labels`, [batch, tokens].
            output: The student's output.
        """
        with torch.no_grad():
            teacher = pl_module.teacher(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
        losses = distillation_loss(output.logits, teacher.logits, batch["labels"], **self.weights)
        for name, value in losses.items():
            if name != "total":
                pl_module.log(f"train/{name}", value.detach())
        return losses["total"]
