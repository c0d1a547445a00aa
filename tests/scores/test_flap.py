from __future__ import annotations

import statistics

import pytest
import torch

from lit_prune.scores.flap import fluctuation, standardised


def rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.0, 3.0, 0.1, 2.0, 0.5])
    return torch.randn(30, 6, generator=generator) * spread + torch.arange(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_scores_its_variance_times_its_squared_sum(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = rows()
    expected = []
    for j in range(6):
        variance = statistics.pvariance(x[:, j].tolist())
        expected.append(variance * sum(float(value) ** 2 for value in weight[:, j]))
    scores = fluctuation(weight, x.var(0, correction=0))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert scores[1] == 0  # what does not fluctuate is replaced by its mean without loss


@pytest.mark.parametrize("squared", [False, True])
def test_columns_are_standardised_over_their_layer(squared: bool) -> None:
    columns = torch.tensor([3.0, 0.5, 2.0, 7.0, 1.0])
    values = [float(x) ** 2 if squared else float(x) for x in columns]
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    expected = [(value - mean) / deviation for value in values]
    assert standardised(columns, squared=squared).tolist() == pytest.approx(expected, abs=1e-6)
    # the number of tokens in a variance's divisor makes no difference
    again = standardised(columns * 1.7, squared=squared).tolist()
    assert again == pytest.approx(expected, abs=1e-6)


def test_columns_without_differences_are_all_the_mean() -> None:
    assert standardised(torch.full((4,), 0.1)).tolist() == [0] * 4
    assert standardised(torch.tensor([5.0])).tolist() == [0]
