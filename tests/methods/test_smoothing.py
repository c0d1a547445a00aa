from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.methods.smoothing import Smoothing


def batches(number: int = 5, seed: int = 0) -> list[dict[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "channel": [torch.rand(4, generator=generator), torch.rand(3, generator=generator)],
            "query": [torch.rand(2, 3, generator=generator)],
        }
        for _ in range(number)
    ]


def literal(series: list[float], x1: float, x2: float) -> float:
    """Equation 7, one number at a time."""
    importance = uncertainty = total = 0.0
    for score in series:
        importance = x1 * importance + (1 - x1) * score
        uncertainty = x2 * uncertainty + (1 - x2) * abs(score - importance)
        total += importance * uncertainty
    return total


def smoothed(data: list[Any], **options: Any) -> dict[str, list[Tensor]]:
    smoothing = Smoothing(**options)
    for scores in data:
        smoothing.update(scores)
    return smoothing.result()


@pytest.mark.parametrize(("x1", "x2"), [(0.5, 0.5), (0.8, 0.3), (0.0, 0.9)])
def test_every_entry_follows_the_equation(x1: float, x2: float) -> None:
    data = batches()
    found = smoothed(data, x1=x1, x2=x2)
    assert {name: len(tensors) for name, tensors in found.items()} == {"channel": 2, "query": 1}
    for name, tensors in found.items():
        for place, tensor in enumerate(tensors):
            series = torch.stack([scores[name][place] for scores in data]).flatten(1)
            expected = [literal(column.tolist(), x1, x2) for column in series.T]
            assert tensor.shape == data[0][name][place].shape
            assert tensor.flatten().tolist() == pytest.approx(expected)


def test_the_defaults_are_halves() -> None:
    data = batches()
    for name, tensors in smoothed(data).items():
        for one, other in zip(tensors, smoothed(data, x1=0.5, x2=0.5)[name], strict=True):
            assert torch.equal(one, other)


def test_without_it_the_result_is_the_mean() -> None:
    data = batches()
    for name, tensors in smoothed(data, enabled=False).items():
        for place, tensor in enumerate(tensors):
            expected = torch.stack([scores[name][place] for scores in data]).mean(0)
            torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_restart_forgets(enabled: bool) -> None:
    data, smoothing = batches(), Smoothing(enabled)
    for scores in batches(3, seed=8):
        smoothing.update({**scores, "hidden": scores["query"]})
    smoothing.restart()
    for scores in data:
        smoothing.update(scores)
    expected = smoothed(data, enabled=enabled)
    assert smoothing.result().keys() == expected.keys()
    for name, tensors in smoothing.result().items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected[name], strict=True))


def test_a_constant_fades_when_it_is_carried_on() -> None:
    """Why each evaluation starts afresh: a constant I gives 0.77 I² once, and next to nothing."""
    smoothing, sums = Smoothing(), []
    for _ in range(2):
        for _ in range(10):
            smoothing.update({"channel": [torch.tensor([3.0])]})
        sums.append(float(smoothing.result()["channel"][0]))
    assert sums[0] / 9 == pytest.approx(0.77, abs=0.005)
    assert (sums[1] - sums[0]) / 9 == pytest.approx(0.006, abs=0.0005)


def test_neither_batches_nor_results_are_changed_later() -> None:
    first, second = batches(2)
    copy = {name: [x.clone() for x in tensors] for name, tensors in first.items()}
    for enabled in (True, False):
        smoothing = Smoothing(enabled)
        smoothing.update(first)
        result = smoothing.result()
        before = result["query"][0].clone()
        smoothing.update(second)
        assert torch.equal(result["query"][0], before)
        for name, tensors in copy.items():
            assert all(torch.equal(a, b) for a, b in zip(tensors, first[name], strict=True))


def test_scores_of_half_precision_are_summed_in_float32() -> None:
    data = [{"hidden": [torch.full((2,), 1 / 512, dtype=torch.bfloat16)]} for _ in range(600)]
    result = smoothed(data, enabled=False)["hidden"][0]
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx([1 / 512] * 2, rel=1e-5)


@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.5, -0.1), (float("nan"), 0.5)])
def test_shares_out_of_range_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="smoothing shares x1 and x2 from 0 to below 1, got"):
        Smoothing(True, *shares)


def test_no_batch_has_no_result() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        Smoothing().result()
