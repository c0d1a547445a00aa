from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.scores.fusion import fuse


def scores(seed: int, layers: int = 4) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "group": [torch.rand(3, generator=generator) * (i + 1) for i in range(layers)],
        "channel": [torch.rand(7, generator=generator) for _ in range(layers)],
    }


def literal(coarse: Any, fine: Any, mixing: str, axis: str, layer: int, unit: int) -> float:
    a, b = float(coarse[axis][layer][unit]), float(fine[axis][layer][unit])
    if mixing == "sum":
        return a + b
    a /= sum(coarse[axis][layer].tolist()) / len(coarse[axis][layer])
    b /= sum(fine[axis][layer].tolist()) / len(fine[axis][layer])
    if mixing == "normalised":
        return a + b
    late = layer / (len(fine[axis]) - 1)
    return late * a + (1 - late) * b


@pytest.mark.parametrize("mixing", ["sum", "normalised", "depth"])
def test_it_is_the_formula(mixing: Any) -> None:
    coarse, fine = scores(0), scores(1)
    found = fuse(coarse, fine, mixing)
    assert found.keys() == coarse.keys()
    for axis, layers in found.items():
        assert len(layers) == 4
        for layer, values in enumerate(layers):
            expected = [literal(coarse, fine, mixing, axis, layer, u) for u in range(len(values))]
            assert values.tolist() == pytest.approx(expected, rel=1e-5)


def test_depth_goes_from_fine_to_coarse() -> None:
    coarse, fine = scores(0), scores(1)
    found = fuse(coarse, fine, "depth")
    assert torch.equal(found["group"][0].argsort(), fine["group"][0].argsort())
    assert torch.equal(found["group"][-1].argsort(), coarse["group"][-1].argsort())


def test_normalised_weighs_both_alike() -> None:
    coarse, fine = scores(0), {a: [x * 1000 for x in xs] for a, xs in scores(1).items()}
    small = fuse(coarse, scores(1), "normalised")
    large = fuse(coarse, fine, "normalised")
    for axis in small:
        assert all(map(torch.allclose, small[axis], large[axis]))


@pytest.mark.parametrize("mixing", ["sum", "normalised", "depth"])
def test_one_layer_and_silent_units_are_no_trouble(mixing: Any) -> None:
    silent = {"channel": [torch.zeros(3)]}
    found = fuse(silent, {"channel": [torch.tensor([2.0, 1.0, 3.0])]}, mixing)["channel"]
    assert found[0].argsort().tolist() == [1, 0, 2]
