"""Training losses on logits that never make a float32 copy of all of them.

Each takes unshifted labels; position t counts if the label of t + 1 isn't -100, and losses are
means over the positions that count. Loss and gradient are computed in one sweep over blocks of
rows, in float32 buffers of some MB; what is kept is one gradient in the student's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import block_rows, predicted_tokens, row_blocks


class LossTerm(Protocol):
    """Computes a training loss from a batch and the model's output, in place of cross-entropy."""

    def __call__(self, module: Any, batch: Mapping[str, Tensor], output: Any) -> Tensor:
        """The loss of a batch, []."""
        ...


@dataclass(frozen=True)
class _Weights:
    """How much each loss counts; a weight of 0 leaves the loss out."""

    task: float
    kl: float
    mse: float
    temperature: float


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    task_weight: float = 1.0,
    kl_weight: float = 1.0,
    mse_weight: float = 0.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Weighted sum of next-token cross-entropy, KL divergence and MSE to a teacher, in one sweep.

    KL is T² · KL(softmax(teacher / T) ‖ softmax(student / T)) (Hinton et al., 2015: T² keeps the
    gradient's scale); MSE is the mean over tokens and vocabulary of the squared difference.

    Args:
        student_logits: [batch, length, vocab]; the gradient comes in its dtype.
        teacher_logits: The same shape; None if only the task's loss is asked for.
        labels: Unshifted labels [batch, length], -100 = ignored.
        task_weight: Weight of the cross-entropy.
        kl_weight: Weight of the KL divergence.
        mse_weight: Weight of the MSE.
        temperature: T of the KL divergence.

    Returns:
        `total` with a gradient, and `task`, `kl`, `mse` (those of nonzero weight) without; all [],
        float32, 0 if no token counts.

    Raises:
        UserError: The shapes differ, the teacher is missing, or the temperature isn't positive.
    """
    if temperature <= 0:
        raise UserError(f"expected a temperature above 0, got {temperature}")
    weights = _Weights(task_weight, kl_weight, mse_weight, temperature)
    if kl_weight or mse_weight:
        _check_shapes(student_logits, teacher_logits)
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.autocast(student_logits.device.type, enabled=False):  # products stay in float32
        total, parts = _TokenLosses.apply(
            student_logits, teacher_logits, labels, weights, with_gradient
        )
    used = {"task": task_weight, "kl": kl_weight, "mse": mse_weight}
    named = zip(used.items(), parts.unbind(), strict=True)
    return {"total": total} | {name: part for (name, weight), part in named if weight}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy [], as the model's own loss but with little memory.

    Args:
        logits: [batch, length, vocab].
        labels: Unshifted labels [batch, length], -100 = ignored.
    """
    return distillation_loss(logits, None, labels, kl_weight=0)["total"]


def hidden_mse(student_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
    """Squared difference of one layer's hidden states, mean over predicted tokens and features.

    Args:
        student_hidden: [batch, length, hidden].
        teacher_hidden: [batch, length, hidden].
        labels: Unshifted labels [batch, length], -100 = ignored.

    Returns:
        The loss [].

    Raises:
        UserError: The shapes differ, as they do after the hidden axis was cut.
    """
    return distillation_loss(
        student_hidden, teacher_hidden, labels, task_weight=0, kl_weight=0, mse_weight=1
    )["total"]


def _check_shapes(student: Tensor, teacher: Tensor | None) -> None:
    """Refuse a teacher that can't be compared with the student."""
    if teacher is None:
        raise UserError("expected the teacher's outputs for a distillation loss, got none")
    if student.shape != teacher.shape:
        raise UserError(
            f"expected teacher and student outputs of one shape, got {list(teacher.shape)} and "
            f"{list(student.shape)}; distil on what both models share"
        )


class _TokenLosses(torch.autograd.Function):
    """The losses and, in the same sweep, the gradient of their weighted sum."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        weights: _Weights,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        width = student.shape[-1]
        student_rows = student.reshape(-1, width)
        teacher_rows = None if teacher is None else teacher.reshape(-1, width)
        rows, targets = predicted_tokens(labels)
        dtype = torch.promote_types(student.dtype, torch.float32)
        sums = torch.zeros(3, dtype=dtype, device=student.device)
        gradient = torch.empty_like(student_rows) if with_gradient else None
        height = min(block_rows(width, student.device), max(len(rows), 1))
        # Buffers used again: fresh ones would cost a page fault for every 4 kB of every block.
        buffers = torch.empty(5, height, width, dtype=dtype, device=student.device)
        for block, part in row_blocks(rows, height):
            values, taught, slope, *scratch = buffers[:, : part.stop - part.start]
            values.copy_(student_rows[block])
            if teacher_rows is not None:
                taught.copy_(teacher_rows[block])
            sums += _block_losses(values, taught, slope, scratch, targets[part], weights)
            if gradient is not None:
                gradient[block] = slope
        if gradient is not None:
            ignored = torch.ones(len(gradient), dtype=torch.bool, device=rows.device)
            gradient[ignored.index_fill_(0, rows, False)] = 0
        # The division by the number of tokens waits for backward, after the loss scale: p / tokens
        # would underflow in float16.
        ctx.tokens = max(len(rows), 1)
        ctx.shape = student.shape
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        means = sums / ctx.tokens
        scale = means.new_tensor([weights.task, weights.kl, weights.mse])
        ctx.mark_non_differentiable(means)
        return means @ scale, means

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # In place, as it is as large as the logits; a second backward is refused by autograd.
        return gradient.mul_(grad_outputs[0] / ctx.tokens).view(ctx.shape), None, None, None, None


def _block_losses(
    student: Tensor,
    teacher: Tensor,
    slope: Tensor,
    scratch: list[Tensor],
    targets: Tensor,
    weights: _Weights,
) -> Tensor:
    """Summed losses of a block [3]; `slope` becomes the gradient of their weighted sum.

    All but `targets` [rows] are buffers [rows, width] that are overwritten.
    """
    sums = student.new_zeros(3)
    slope.zero_()
    work, other = scratch
    if weights.mse:
        torch.sub(student, teacher, out=work)
        slope.add_(work, alpha=2 * weights.mse / student.shape[1])
        sums[2] = work.square_().sum() / student.shape[1]
    if weights.task:
        picked = targets[:, None]
        torch.log_softmax(student, 1, out=work)
        sums[0] = -work.gather(1, picked).sum()
        one_hot = torch.full_like(picked, -weights.task, dtype=slope.dtype)
        slope.add_(work.exp_(), alpha=weights.task).scatter_add_(1, picked, one_hot)
    if weights.kl:
        t = weights.temperature
        log_p = torch.log_softmax(student.div_(t), 1, out=work)
        log_q = torch.log_softmax(teacher.div_(t), 1, out=other)
        q = torch.exp(log_q, out=student)
        sums[1] = torch.mul(q, log_q.sub_(log_p), out=teacher).sum() * t * t
        slope.add_(log_p.exp_().sub_(q), alpha=weights.kl * t)
    return sums
