"""Speeds of models that take turns."""

from __future__ import annotations

import torch

from lit_prune.evaluation.speed import median_speed, throughput
from tests.evaluation.small import tiny_model


def test_throughput_alternates_and_leaves_the_modes():
    models = {"dense": tiny_model().train(), "pruned": tiny_model().eval()}
    order: list[tuple[str, bool]] = []
    for name, model in models.items():
        model.register_forward_hook(
            lambda module, args, out, name=name: order.append((name, module.training))
        )
    speeds = throughput(models, torch.ones(1, 8, dtype=torch.long), rounds=3)
    assert order == [("dense", False), ("pruned", False)] * 4  # one warm-up each
    assert {name: len(values) for name, values in speeds.items()} == {"dense": 3, "pruned": 3}
    assert all(value > 0 for values in speeds.values() for value in values)
    assert (models["dense"].training, models["pruned"].training) == (True, False)


def test_median_speed_ignores_a_disturbed_round():
    assert median_speed([10.0, 1.0, 12.0]) == 10.0
