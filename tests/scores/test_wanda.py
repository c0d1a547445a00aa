from __future__ import annotations

import pytest
import torch

from lit_prune.scores import column_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_column_scores_its_input_norm_times_its_absolute_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator).to(dtype)
    x = torch.randn(30, 5, generator=generator) * torch.tensor([1.0, 0.0, 3.0, 0.1, 2.0])
    expected = []
    for j in range(5):
        norm = sum(float(value) ** 2 for value in x[:, j]) ** 0.5
        expected.append(norm * sum(abs(float(value)) for value in weight[:, j]))
    scores = column_scores(weight, x.norm(dim=0))
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert scores[1] == 0
