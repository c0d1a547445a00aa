from __future__ import annotations

import pytest
import torch

from lit_prune.scores.fisher import entry_fisher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_scores_its_squared_slopes_token_by_token(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(11, 4, generator=generator).to(dtype)
    gradient = torch.randn(11, 4, generator=generator).to(dtype)
    expected = [0.0] * 4
    for t in range(11):
        for j in range(4):
            expected[j] += (float(a[t, j]) * float(gradient[t, j])) ** 2
    kept = a.clone(), gradient.clone()
    scores = entry_fisher(a, gradient)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(a, kept[0])  # nothing is overwritten
    assert torch.equal(gradient, kept[1])


def test_slopes_that_cancel_count_all_the_same() -> None:
    a, gradient = torch.ones(2, 1), torch.tensor([[3.0], [-3.0]])
    assert entry_fisher(a, gradient).tolist() == [18]
