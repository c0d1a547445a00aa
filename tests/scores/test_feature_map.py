from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from lit_prune.scores.feature_map import coupled, sensitivity


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["fms", "wanda", "magnitude", "gradient"])
def test_entries_multiply_what_the_criterion_names(criterion: Any, dtype: torch.dtype) -> None:
    weight, gradient = drawn(5, 4).to(dtype), drawn(5, 4, seed=1)
    norms = drawn(4, seed=2).abs()
    kept = weight.clone(), gradient.clone(), norms.clone()
    found = sensitivity(weight, norms, gradient, criterion)
    for i, j in itertools.product(range(5), range(4)):
        value = abs(float(weight[i, j]))
        if criterion in ("fms", "wanda"):
            value *= float(norms[j])
        if criterion in ("fms", "gradient"):
            value *= abs(float(gradient[i, j]))
        assert found[i, j].item() == pytest.approx(value, rel=1e-5)
    assert found.dtype == torch.float32
    for now, before in zip((weight, gradient, norms), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("criterion", ["fms", "gradient"])
def test_a_gradient_that_is_missing_is_refused(criterion: Any) -> None:
    with pytest.raises(ValueError, match=f"expected a gradient for {criterion}, got none"):
        sensitivity(torch.ones(2, 2), torch.ones(2), None, criterion)


@pytest.mark.parametrize("criterion", ["fms", "wanda"])
def test_norms_that_are_missing_are_refused(criterion: Any) -> None:
    with pytest.raises(ValueError, match=f"expected norms for {criterion}, got none"):
        sensitivity(torch.ones(2, 2), None, torch.ones(2, 2), criterion)


G, Q, K = 2, 3, 4
ROWS = {
    "query": drawn(G, Q, K, seed=1).abs(),
    "key": drawn(G, K, seed=2).abs(),
    "value": drawn(G, K, seed=3).abs(),
    "output": drawn(G, Q, K, seed=4).abs(),
    "gate": drawn(5, seed=5).abs(),
    "up": drawn(5, seed=6).abs(),
    "down": drawn(5, seed=7).abs(),
}


def test_a_channel_scores_its_highest_structure() -> None:
    found = coupled(ROWS, "channel").tolist()
    assert found == [max(float(ROWS[r][c]) for r in ("gate", "up", "down")) for c in range(5)]
    two = {role: ROWS[role] for role in ("up", "down")}
    assert coupled(two, "channel").tolist() == [
        max(float(two["up"][c]), float(two["down"][c])) for c in range(5)
    ]


def test_a_head_sums_the_highest_of_each_row() -> None:
    found = coupled(ROWS, "group")
    for g in range(G):
        total = 0.0
        for i in range(K):
            query = sum(float(ROWS["query"][g, q, i]) for q in range(Q))
            output = sum(float(ROWS["output"][g, q, i]) for q in range(Q))
            total += max(query, float(ROWS["key"][g, i]), float(ROWS["value"][g, i]), output)
        assert found[g].item() == pytest.approx(total, rel=1e-6)
    found = coupled(ROWS, "query")
    assert found.shape == (G, Q)
    for g, q in itertools.product(range(G), range(Q)):
        both = (ROWS["query"][g, q], ROWS["output"][g, q])
        total = sum(max(float(both[0][i]), float(both[1][i])) for i in range(K))
        assert found[g, q].item() == pytest.approx(total, rel=1e-6)
    found = coupled(ROWS, "value")
    assert found.shape == (G, K)
    for g, i in itertools.product(range(G), range(K)):
        output = sum(float(ROWS["output"][g, q, i]) for q in range(Q))
        assert found[g, i].item() == pytest.approx(max(output, float(ROWS["value"][g, i])))


def test_rows_of_keys_without_a_value_stand_alone() -> None:
    """After a cut of values there are fewer of them than of keys."""
    cut = ROWS | {"value": ROWS["value"][:, :2], "output": ROWS["output"][:, :, :2]}
    whole = ROWS | {
        "value": ROWS["value"] * torch.tensor([1, 1, 0, 0]),
        "output": ROWS["output"] * torch.tensor([1, 1, 0, 0]),
    }
    for axis in ("group", "query"):
        assert torch.allclose(coupled(cut, axis), coupled(whole, axis))
