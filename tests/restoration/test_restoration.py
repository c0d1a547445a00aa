from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.restoration.least_squares import Gram, least_squares

Ridge = Literal["weights", "zero"]
RIDGES: tuple[Ridge, ...] = ("weights", "zero")
#: Outputs: more than the removed columns, and fewer (the other right side is solved for).
OUTPUTS = (30, 3)


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def activations(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Correlated features of unequal size, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scale = torch.rand(features, generator=generator, dtype=torch.float64) + 0.3
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    return x @ (torch.eye(features, dtype=torch.float64) + 0.3 * mixing) * scale


def case(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, activations and kept columns."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, 16, generator=generator, dtype=torch.float64)
    keep = torch.randperm(16, generator=generator)[:9].sort().values
    return weight, activations(200, 16), keep


def literal(weight: Tensor, x: Tensor, keep: Tensor, ridge: Ridge, delta: float) -> Tensor:
    """The docstring's formulas in float64, with an inverse; x is [tokens, features]."""
    x = x.T
    removed = [i for i in range(len(x)) if i not in keep.tolist()]
    kept = x[keep] @ x[keep].T
    damped = kept + delta * kept.diagonal().mean() * torch.eye(len(keep), dtype=x.dtype)
    if ridge == "zero":
        return weight @ x @ x[keep].T @ torch.linalg.inv(damped)
    return weight[:, keep] + weight[:, removed] @ x[removed] @ x[keep].T @ torch.linalg.inv(damped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gram_is_the_sum_of_outer_products(dtype: torch.dtype) -> None:
    gram, expected = Gram(12), torch.zeros(12, 12, dtype=torch.float64)
    for seed in range(4):
        x = (activations(50, 12, seed) * 3).to(dtype)
        gram.add(x)
        for row in x.double():
            expected += torch.outer(row, row)
    assert gram.matrix.dtype == torch.float32
    # rounded inputs would be wrong in the third digit
    scale = expected.diagonal().sqrt()
    assert ((gram.matrix - expected).abs() / torch.outer(scale, scale)).max() < 2e-6
    norms = torch.stack([scale[i] for i in range(12)])
    assert torch.allclose(gram.norms().double(), norms, rtol=1e-5)


def test_norms_are_zero_for_what_is_never_active() -> None:
    gram = Gram(3)
    gram.add(torch.tensor([[3.0, 0.0, -1.0], [4.0, 0.0, 0.0]]))
    assert gram.norms().tolist() == [5.0, 0.0, 1.0]


class Spy:
    """Stands in for a matrix and notes the precision that products would have."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def addmm_(self, *args: Tensor) -> None:
        self.seen.append(torch.get_float32_matmul_precision())


@pytest.mark.parametrize("set_before", ["highest", "high", "medium"])
def test_products_have_the_precision_that_keeps_them_exact(set_before: str) -> None:
    torch.set_float32_matmul_precision(set_before)
    gram, spy = Gram(4), Spy()
    gram.matrix = spy  # pyright: ignore[reportAttributeAccessIssue]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gram.add(torch.ones(2, 4, dtype=dtype))
    assert spy.seen == ["highest", "medium", "highest"]
    assert torch.get_float32_matmul_precision() == set_before


def test_the_precision_is_restored_after_an_error_and_a_solution() -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(RuntimeError):
        Gram(4).add(torch.ones(2, 5, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == "high"
    weight, x, keep = case(3)
    least_squares(weight, (x.T @ x).float(), keep)
    assert torch.get_float32_matmul_precision() == "high"


def test_solutions_are_exact_under_a_training_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    solve = torch.cholesky_solve

    def spy(*args: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return solve(*args)

    monkeypatch.setattr(torch, "cholesky_solve", spy)
    torch.set_float32_matmul_precision("medium")
    weight, x, keep = case(3)
    least_squares(weight, (x.T @ x).float(), keep)
    assert seen == ["highest"]


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("ridge", RIDGES)
def test_without_a_ridge_it_is_least_squares(ridge: Ridge, outputs: int) -> None:
    weight, x, keep = case(outputs)
    expected = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    found = least_squares(weight, (x.T @ x).float(), keep, ridge=ridge, delta=1e-9)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=2e-4)
    assert (weight[:, keep] - expected).abs().max() > 0.05, "restoring must change something"


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("delta", [1e-3, 0.1, 3.0])
def test_with_a_ridge_it_is_the_formula(delta: float, ridge: Ridge, outputs: int) -> None:
    weight, x, keep = case(outputs)
    expected = literal(weight, x, keep, ridge, delta)
    found = least_squares(weight, (x.T @ x).float(), keep, ridge=ridge, delta=delta)
    assert torch.allclose(found.double(), expected, atol=1e-4)


def test_the_ridges_differ_at_a_finite_delta() -> None:
    weight, x, keep = case(3)
    a, b = (literal(weight, x, keep, ridge, 0.1) for ridge in RIDGES)
    assert (a - b).abs().max() > 0.05


def test_nothing_changes_when_nothing_is_cut() -> None:
    weight, x, _ = case(5)
    weight, everything = weight.bfloat16(), torch.arange(16)
    gram = (x.T @ x).float()
    assert torch.equal(least_squares(weight, gram, everything), weight.float())
    assert not torch.equal(least_squares(weight, gram, everything, ridge="zero"), weight.float())


def test_the_output_error_is_less_than_without() -> None:
    weight, x, keep = case(6)
    dense = x @ weight.T
    restored = least_squares(weight, (x.T @ x).float(), keep).double()
    before = (x[:, keep] @ weight[:, keep].T - dense).square().sum()
    assert (x[:, keep] @ restored.T - dense).square().sum() < 0.7 * before


def test_the_ridge_is_raised_while_the_matrix_is_not_positive_definite() -> None:
    weight, _, _ = case(4)
    keep = torch.arange(9)
    gram = torch.eye(16, dtype=torch.float64)
    gram[0, 9] = gram[9, 0] = 0.5
    gram[0, 1] = gram[1, 0] = 1.05  # eigenvalues 2.05 and -0.05: 1e-3 and 1e-2 do not suffice
    damped = gram[:9, :9] + 0.1 * torch.eye(9, dtype=torch.float64)
    expected = weight[:, :9] + weight[:, 9:] @ gram[9:, :9] @ torch.linalg.inv(damped)
    found = least_squares(weight, gram.float(), keep, delta=1e-3)
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize("bad", ["nan", "nan off the diagonal", "negative", "zero"])
def test_a_hopeless_matrix_is_an_error(bad: str) -> None:
    weight, x, keep = case(4)
    gram = (x.T @ x).float()
    if bad == "nan":
        gram.fill_(float("nan"))
    elif bad == "nan off the diagonal":
        gram[keep[0], keep[3]] = gram[keep[3], keep[0]] = float("nan")
    else:
        gram *= -1 if bad == "negative" else 0
    with pytest.raises(
        UserError, match=r"positive definite with a ridge of up to 100 of"
    ) as caught:
        least_squares(weight, gram, keep)
    assert "\n" not in str(caught.value)
