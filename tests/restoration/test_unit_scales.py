from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.restoration.unit_scales import unit_scales

OWNERS = {
    "heads": torch.arange(12) // 3,
    "channels": torch.arange(12),
    "mixed up": torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 3, 3, 0, 2]),
}


def case(seed: int = 0, tokens: int = 60, outputs: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs of what is left, and a target that differs from what it puts out."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    mixing = torch.eye(12).double() + 0.3 * torch.randn(12, 12, **draw)
    x = torch.randn(tokens, 12, **draw) @ mixing
    weight = torch.randn(outputs, 12, **draw)
    wanted = torch.linspace(0.5, 1.7, 12).double()
    target = x @ (weight * wanted).T + 0.5 * torch.randn(tokens, outputs, **draw)
    return weight, x, target


def contributions(weight: Tensor, x: Tensor, owners: Tensor) -> Tensor:
    """A: a row for each token and output, a column for each unit."""
    columns = []
    for unit in range(int(owners.max()) + 1):
        mine = (owners == unit).nonzero().flatten()
        columns.append((x[:, mine] @ weight[:, mine].T).flatten())
    return torch.stack(columns, 1)


def literal(weight: Tensor, x: Tensor, target: Tensor, owners: Tensor) -> Tensor:
    """1 + r by least squares, the ridge of a hundredth as rows below A."""
    a = contributions(weight, x, owners)
    ridge = (0.01 * (a.T @ a).diagonal().mean()).sqrt() * torch.eye(a.shape[1], dtype=a.dtype)
    rest = target.flatten() - a.sum(1)
    r = torch.linalg.lstsq(
        torch.cat([a, ridge]), torch.cat([rest, rest.new_zeros(a.shape[1])])
    ).solution
    return 1 + r


def found(weight: Tensor, x: Tensor, target: Tensor, owners: Tensor) -> Tensor | None:
    gram, cross = (x.T @ x).float(), (x.T @ target).float()
    return unit_scales(weight, gram, cross, owners)


@pytest.mark.parametrize("name", OWNERS)
def test_it_is_least_squares(name: str) -> None:
    weight, x, target = case()
    scales = found(weight, x, target, OWNERS[name])
    expected = literal(weight, x, target, OWNERS[name])
    assert scales is not None
    assert scales.dtype == torch.float32
    assert torch.allclose(scales.double(), expected, atol=2e-4)
    assert (expected - 1).abs().max() > 0.1


@pytest.mark.parametrize("name", OWNERS)
def test_nothing_changes_when_nothing_was_cut(name: str) -> None:
    weight, x, _ = case()
    scales = found(weight, x, x @ weight.T, OWNERS[name])
    assert scales is not None
    assert torch.allclose(scales, torch.ones_like(scales), atol=1e-4)


@pytest.mark.parametrize("name", ["heads", "channels"])
def test_a_unit_makes_up_for_one_that_is_gone_and_did_the_same(name: str) -> None:
    weight, x, _ = case(tokens=200)
    owners, keep = OWNERS[name], torch.arange(9)
    weight[:, 9:] = weight[:, :3]
    x[:, 9:] = x[:, :3] + 0.1 * x[:, 3:6]
    dense = x @ weight.T
    kept, inputs = weight[:, keep], x[:, keep]
    scales = found(kept, inputs, dense, owners[keep])
    assert scales is not None
    scaled = kept * scales.double()[owners[keep]]
    before = (inputs @ kept.T - dense).square().sum()
    after = (inputs @ scaled.T - dense).square().sum()
    assert after < 0.1 * before
    assert torch.allclose(scales[owners[:3]], torch.full((3,), 2.0), atol=0.2)


@pytest.mark.parametrize("factor", [9.5, -9.5, 10.5, -10.5])
def test_scales_out_of_range_end_the_tuning(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lit_prune.restoration.unit_scales._DELTA", 1e-7
    )  # the ridge draws scales towards 1
    weight, x, _ = case()
    scales = found(weight, x, factor * (x @ weight.T), OWNERS["heads"])
    assert (scales is None) == (abs(factor) > 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_precision_weights_are_taken_as_they_are(dtype: torch.dtype) -> None:
    weight, x, target = case()
    weight = weight.bfloat16()
    scales = found(weight.to(dtype), x, target, OWNERS["heads"])
    expected = literal(weight.double(), x, target, OWNERS["heads"])
    assert scales is not None
    assert torch.allclose(scales.double(), expected, atol=2e-4)


def test_silent_units_keep_their_scale() -> None:
    weight, x, target = case()
    weight[:, OWNERS["heads"] == 1] = 0
    scales = found(weight, x, target, OWNERS["heads"])
    assert scales is not None
    assert scales[1] == 1
    silent = found(weight * 0, x, target, OWNERS["heads"])
    assert silent is not None
    assert silent.tolist() == [1.0] * 4


def test_products_are_exact_under_a_training_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    solve = torch.linalg.solve

    def spy(*args: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return solve(*args)

    monkeypatch.setattr(torch.linalg, "solve", spy)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found(*case(), OWNERS["heads"])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


@pytest.mark.parametrize("where", ["gram", "cross"])
def test_statistics_that_are_not_finite_are_refused(where: str) -> None:
    weight, x, target = case()
    gram, cross = (x.T @ x).float(), (x.T @ target).float()
    (gram if where == "gram" else cross)[0, 0] = float("nan")
    with pytest.raises(UserError, match="finite calibration activations") as caught:
        unit_scales(weight, gram, cross, OWNERS["heads"])
    assert "\n" not in str(caught.value)
