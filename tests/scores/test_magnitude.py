from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_prune.scores.magnitude import feature_norms, kernel_norms, magnitude
from lit_prune.structure import Structure
from lit_prune.structure.coupling import per_unit, view
from tests.structure.tiny import tiny_model

Index = tuple[int, ...]


def owned(model: Any, axis: str, unit: Index) -> list[float]:
    """What a unit of the second layer of the tiny llama owns: G = 2, q = 3, k = v = 8."""
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    values: list[float] = []

    def rows(module: Any, numbers: list[int]) -> None:
        for i in numbers:
            values.extend([*module.weight[i].tolist(), module.bias[i].item()])

    def columns(module: Any, numbers: list[int]) -> None:
        for i in numbers:
            values.extend(module.weight[:, i].tolist())

    if axis == "channel":
        rows(mlp.gate_proj, [unit[0]])
        rows(mlp.up_proj, [unit[0]])
        columns(mlp.down_proj, [unit[0]])
    elif axis == "value":
        g, v = unit
        rows(attention.v_proj, [g * 8 + v])
        columns(attention.o_proj, [(g * 3 + q) * 8 + v for q in range(3)])
    else:
        heads = [unit[0] * 3 + unit[1]] if axis == "query" else [unit[0] * 3 + q for q in range(3)]
        own = [head * 8 + i for head in heads for i in range(8)]
        rows(attention.q_proj, own)
        columns(attention.o_proj, own)
        if axis == "group":
            rows(attention.k_proj, [unit[0] * 8 + i for i in range(8)])
            rows(attention.v_proj, [unit[0] * 8 + i for i in range(8)])
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(
    ("axis", "shape"), [("channel", (20,)), ("group", (2,)), ("query", (2, 3)), ("value", (2, 8))]
)
def test_a_unit_scores_the_norm_of_all_that_it_owns(
    axis: str, shape: Index, norm: Any, dtype: torch.dtype
) -> None:
    model: Any = tiny_model("llama", dtype=dtype)
    weights = dict(model.named_parameters())
    rows = view(model, Structure.of(model), 1, {k: w.detach() for k, w in weights.items()})
    scores = magnitude(per_unit(rows, axis), norm)
    assert scores.shape == shape
    assert scores.dtype == torch.float32
    for unit in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)):
        place: Index = tuple(unit.tolist())
        values = owned(model, axis, place)
        size = sum(abs(x) for x in values) if norm == "l1" else sum(x * x for x in values) ** 0.5
        assert scores[place].item() == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize(
    ("axis", "shape"), [("channel", (20,)), ("group", (2,)), ("query", (2, 3))]
)
def test_kernels_are_rows_and_columns(axis: str, shape: Index) -> None:
    model: Any = tiny_model("llama")
    weights = {k: w.detach() for k, w in model.named_parameters()}
    scores = kernel_norms(view(model, Structure.of(model), 1, weights), axis)
    assert scores.shape == shape
    for unit in torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape)):
        place: Index = tuple(unit.tolist())
        values, size = owned(model, axis, place), 0.0
        for length, number in _kernels(axis):
            for _ in range(number):
                own, values = values[:length], values[length:]
                size += sum(x * x for x in own) ** 0.5
        assert not values
        assert scores[place].item() == pytest.approx(size, rel=1e-5)


def _kernels(axis: str) -> list[tuple[int, int]]:
    """Entries and number of a unit's kernels, in the order of `owned`; rows have a bias."""
    if axis == "channel":
        return [(37, 2), (36, 1)]
    return [(37, 8), (36, 8)] if axis == "query" else [(37, 24), (36, 24), (37, 16)]


def test_a_feature_scores_what_meets_it_in_each_matrix() -> None:
    model: Any = tiny_model("llama")
    weights = {k: w.detach() for k, w in model.named_parameters()}
    scores = feature_norms(view(model, Structure.of(model), 1, weights), 36)
    layer = model.model.layers[1]
    for feature in range(36):
        size = 0.0
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            size += module.weight[:, feature].norm().item()
        size += layer.self_attn.o_proj.weight[feature].norm().item()
        for module in (layer.mlp.gate_proj, layer.mlp.up_proj):
            size += module.weight[:, feature].norm().item()
        size += layer.mlp.down_proj.weight[feature].norm().item()
        assert scores[feature].item() == pytest.approx(size, rel=1e-5)


def test_without_a_gate_there_are_two_structures() -> None:
    rows = {"up": torch.tensor([[3.0, 0.0]]), "down": torch.tensor([[-4.0]])}
    assert magnitude(rows, "l2").tolist() == [5]
    assert magnitude(rows, "l1").tolist() == [7]
