"""Training losses against the literal, unchunked float32 forms, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.evaluation import perplexity as evaluation
from lit_prune.recovery import distillation
from lit_prune.recovery.distillation import cross_entropy, distillation_loss, hidden_mse

Case = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluation, "_BLOCK_CPU", 3 * 40)  # 3 rows of 40


def make_case(dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(2, 9, 40, generator=generator) * 3).to(dtype).requires_grad_()
    teacher = (torch.randn(2, 9, 40, generator=generator) * 3).to(dtype)
    labels = torch.randint(40, (2, 9), generator=generator)
    labels[0, :3] = labels[1, 5:] = -100
    return student, teacher, labels


def logit_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    return distillation_loss(student, teacher, labels, task_weight=0, temperature=temperature)[
        "total"
    ]


def literal(case: Case, loss: str, temperature: float = 1.0) -> Tensor:
    """Position by position, in float32, from the definitions."""
    student, teacher, labels = case
    found = []
    for row in range(2):
        for t in range(8):
            label = int(labels[row, t + 1])
            if label == -100:
                continue
            s, q = student[row, t].float(), teacher[row, t].float()
            if loss == "task":
                found.append(-s.softmax(0)[label].log())
            elif loss == "kl":
                p, q = (s / temperature).softmax(0), (q / temperature).softmax(0)
                found.append(temperature**2 * (q * (q / p).log()).sum())
            else:
                found.append((s - q).square().mean())
    return torch.stack(found).mean()


LOSSES: dict[str, tuple[Callable[[Case], Tensor], Callable[[Case], Tensor]]] = {
    "task": (lambda c: cross_entropy(c[0], c[2]), lambda c: literal(c, "task")),
    "kl": (lambda c: logit_kl(*c, temperature=1.0), lambda c: literal(c, "kl")),
    "kl at 2": (lambda c: logit_kl(*c, temperature=2.0), lambda c: literal(c, "kl", 2.0)),
    "mse": (lambda c: hidden_mse(*c), lambda c: literal(c, "mse")),
    "all": (
        lambda c: distillation_loss(
            *c, task_weight=0.3, kl_weight=0.6, mse_weight=0.2, temperature=1.5
        )["total"],
        lambda c: 0.3 * literal(c, "task") + 0.6 * literal(c, "kl", 1.5) + 0.2 * literal(c, "mse"),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_the_literal_ones(name: str, dtype: torch.dtype):
    ours, reference = LOSSES[name]
    case = make_case(dtype)
    student = case[0]

    loss = ours(case)
    (7 * loss).backward()
    assert student.grad is not None
    got, student.grad = student.grad, None
    expected = reference(case)
    (7 * expected).backward()

    assert got.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    rtol, atol = (1e-4, 1e-6) if dtype == torch.float32 else (2e-2, 1e-4)
    torch.testing.assert_close(got, student.grad, rtol=rtol, atol=atol)


def test_gradient_in_float64_is_the_numerical_one():
    student, teacher, labels = make_case(torch.float64)

    def total(logits: Tensor) -> Tensor:
        weights = {"task_weight": 0.3, "kl_weight": 0.6, "mse_weight": 0.2}
        return distillation_loss(logits, teacher, labels, temperature=1.5, **weights)["total"]

    total(student).backward()
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(1)).double()
    step = 1e-5 * direction
    with torch.no_grad():
        slope = (total(student + step) - total(student - step)) / 2e-5
    assert student.grad is not None
    torch.testing.assert_close((student.grad * direction).sum(), slope, rtol=1e-7, atol=1e-9)


def test_autocast_changes_nothing():
    student, teacher, labels = make_case()
    plain = distillation_loss(student, teacher, labels, mse_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = distillation_loss(student, teacher, labels, mse_weight=1.0)
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)


def test_a_second_backward_is_refused_not_wrong():
    loss = hidden_mse(*make_case())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cross_entropy_is_the_one_of_transformers():
    from transformers.loss.loss_utils import ForCausalLMLoss

    student, _, labels = make_case()
    expected = ForCausalLMLoss(student, labels, vocab_size=40)
    torch.testing.assert_close(cross_entropy(student, labels), expected)


def test_ignored_positions_get_no_gradient_even_where_logits_are_not_finite():
    student, teacher, labels = make_case()
    counted = torch.zeros(2, 9, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    with torch.no_grad():
        student[~counted] = torch.nan
    distillation_loss(student, teacher, labels, mse_weight=1.0)["total"].backward()
    assert student.grad is not None
    assert (student.grad[~counted] == 0).all()
    assert (student.grad[counted] != 0).any(-1).all()


def test_parts_and_total_agree_and_leave_out_what_has_no_weight():
    student, teacher, labels = make_case()
    parts = distillation_loss(student, teacher, labels, task_weight=0.5, kl_weight=2.0)
    assert set(parts) == {"total", "task", "kl"}
    assert parts["total"].requires_grad
    assert not parts["task"].requires_grad
    torch.testing.assert_close(parts["total"], 0.5 * parts["task"] + 2 * parts["kl"])
    torch.testing.assert_close(parts["kl"], logit_kl(student, teacher, labels))


def test_a_teacher_equal_to_the_student_costs_nothing():
    student, _, labels = make_case()
    assert logit_kl(student, student.detach(), labels, temperature=2.0).item() == 0
    assert hidden_mse(student, student.detach(), labels).item() == 0


def test_no_token_that_counts_gives_zero():
    student, teacher, labels = make_case()
    loss = distillation_loss(student, teacher, torch.full_like(labels, -100))["total"]
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_small_gradients_survive_float16_with_a_loss_scale():
    rows, width = 200, 2000  # p is 6e-6, p / rows below what float16 can hold
    student = torch.zeros(1, rows + 1, width, dtype=torch.float16, requires_grad=True)
    student.data[..., 0] = 12
    labels = torch.zeros(1, rows + 1, dtype=torch.long)
    (cross_entropy(student, labels) * 2.0**14).backward()
    assert student.grad is not None
    expected = 2.0**14 / rows / (math.exp(12) + width - 1)
    assert student.grad[0, 0, 1].item() == pytest.approx(expected, rel=1e-2)


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch):
    student, teacher, labels = make_case()
    calls = []
    original = torch.empty_like

    def watched(tensor: Tensor, **kwargs: Any) -> Tensor:
        calls.append(tensor.shape)
        return original(tensor, **kwargs)

    monkeypatch.setattr(torch, "empty_like", watched)
    with torch.no_grad():
        loss = logit_kl(student, teacher, labels)
    assert torch.Size([18, 40]) not in calls
    assert not loss.requires_grad
    logit_kl(student, teacher, labels)
    assert torch.Size([18, 40]) in calls


def test_blocks_are_small(monkeypatch: pytest.MonkeyPatch):
    largest = 0
    original = distillation._block_losses

    def watched(student: Tensor, *args: Any) -> Tensor:
        nonlocal largest
        largest = max(largest, len(student))
        return original(student, *args)

    monkeypatch.setattr(distillation, "_block_losses", watched)
    logit_kl(*make_case(torch.bfloat16))
    assert largest == 3


def test_losses_do_not_touch_the_logits():
    student, teacher, labels = make_case()
    copies = student.detach().clone(), teacher.clone()
    distillation_loss(student, teacher, labels, mse_weight=1.0, temperature=2.0)["total"].backward()
    assert torch.equal(student.detach(), copies[0])
    assert torch.equal(teacher, copies[1])


def test_misfits_are_one_clear_line():
    student, teacher, labels = make_case()
    with pytest.raises(UserError, match="one shape"):
        logit_kl(student, teacher[..., :-1], labels)
    with pytest.raises(UserError, match="teacher's outputs"):
        distillation_loss(student, None, labels)
    with pytest.raises(UserError, match="temperature above 0"):
        logit_kl(student, teacher, labels, temperature=0)
