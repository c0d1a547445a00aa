"""MINI-LLM's scores against loops over unfused weights."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.gradients.spsa import GateNoise
from lit_prune.methods.zeroth_order import (
    backprop_scores,
    batches_of,
    feature_map_scores,
    gate_scores,
    input_statistics,
    scored_parts,
    together,
)
from lit_prune.structure import Structure
from lit_prune.structure.coupling import parameter_names
from lit_prune.structure.dims import PER_GROUP
from tests.literal_fasp import columns, inputs_of
from tests.structure.tiny import tiny_model

Batch = dict[str, Tensor]
BOTH = ("group", "channel")
CRITERIA = ["fms", "wanda", "magnitude", "gradient"]
#: Where each family keeps the roles of a layer: a module, and the rows in it, or its columns.
LLAMA: dict[str, Any] = {
    "query": ("self_attn.q_proj", range(48)),
    "key": ("self_attn.k_proj", range(16)),
    "value": ("self_attn.v_proj", range(16)),
    "output": ("self_attn.o_proj", None),
    "gate": ("mlp.gate_proj", range(20)),
    "up": ("mlp.up_proj", range(20)),
    "down": ("mlp.down_proj", None),
}
#: family: path of the layers, query heads a group, size of a head, roles.
PLACES: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "llama": ("model.layers", 3, 8, LLAMA),
    "phi3": (
        "model.layers",
        3,
        6,
        {
            "query": ("self_attn.qkv_proj", range(36)),
            "key": ("self_attn.qkv_proj", range(36, 48)),
            "value": ("self_attn.qkv_proj", range(48, 60)),
            "output": ("self_attn.o_proj", None),
            "gate": ("mlp.gate_up_proj", range(20)),
            "up": ("mlp.gate_up_proj", range(20, 40)),
            "down": ("mlp.down_proj", None),
        },
    ),
    "gpt2": (
        "transformer.h",
        1,
        8,
        {
            "query": ("attn.c_attn", range(32)),
            "key": ("attn.c_attn", range(32, 64)),
            "value": ("attn.c_attn", range(64, 96)),
            "output": ("attn.c_proj", None),
            "up": ("mlp.c_fc", range(20)),
            "down": ("mlp.c_proj", None),
        },
    ),
}


def batches(rows: int = 3, length: int = 11) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (2, rows, length), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def statistics_of(model: Any, axes: tuple[str, ...], data: list[Batch]) -> Any:
    found = scored_parts(model, Structure.of(model), axes)
    return input_statistics(model, data, [part.path for layer in found for part in layer])


def literal(
    model: Any, name: str, layer: int, axis: str, criterion: str, gradients: dict[str, Tensor]
) -> list[Any]:
    """Entry by entry: sums of rows, the highest structure, sums of heads."""
    prefix, queries, size, places = PLACES[name]
    data = batches()
    tokens = sum(batch["input_ids"].numel() for batch in data)
    sums: dict[str, list[float]] = {}
    for role, (place, rows) in places.items():
        path = f"{prefix}.{layer}.{place}"
        weight, x = columns(model, path), inputs_of(model, path, data)
        slope = gradients[f"{path}.weight"]
        slope = slope if slope.shape == weight.shape and "h." not in path else slope.T
        norms = [float(column.square().sum().sqrt()) for column in x.T]

        def entry(w: float, norm: float, g: float) -> float:
            factors = {"fms": norm * abs(g), "wanda": norm, "magnitude": 1, "gradient": abs(g)}
            return abs(w) * factors[criterion]

        if rows is None:  # columns of the module that reads the units
            sums[role] = [
                sum(
                    entry(float(weight[i, j]), norms[j], float(slope[i, j]))
                    for i in range(weight.shape[0])
                )
                for j in range(weight.shape[1])
            ]
            continue
        bias = getattr(model.get_submodule(path), "bias", None)
        bias = None if bias is None else bias.tolist()
        own = []
        for i in rows:
            total = sum(
                entry(float(weight[i, j]), norms[j], float(slope[i, j]))
                for j in range(weight.shape[1])
            )
            if bias is not None:
                total += entry(bias[i], tokens**0.5, float(gradients[f"{path}.bias"][i]))
            own.append(total)
        sums[role] = own
    if axis == "channel":
        own = [sums[role] for role in ("gate", "up", "down") if role in sums]
        return [max(values) for values in zip(*own, strict=True)]
    groups = len(sums["key"]) // size
    result: list[Any] = []
    for g in range(groups):
        heads = [
            range((g * queries + q) * size, (g * queries + q + 1) * size) for q in range(queries)
        ]
        if axis == "query":
            result.append([sum(max(sums["query"][r], sums["output"][r]) for r in h) for h in heads])
            continue
        result.append(
            sum(
                max(
                    sum(sums["query"][h[i]] for h in heads),
                    sums["key"][g * size + i],
                    sums["value"][g * size + i],
                    sum(sums["output"][h[i]] for h in heads),
                )
                for i in range(size)
            )
        )
    return result


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", PLACES)
def test_scores_are_those_of_loops(name: str, criterion: Any) -> None:
    model = tiny_model(name)
    axes = (*BOTH, "query") if name == "llama" else BOTH
    generator = torch.Generator().manual_seed(1)
    gradients = {
        key: torch.randn(p.shape, generator=generator) for key, p in model.named_parameters()
    }
    gradient = gradients.__getitem__ if criterion in ("fms", "gradient") else None
    statistics = statistics_of(model, axes, batches())
    scores = feature_map_scores(model, Structure.of(model), axes, statistics, gradient, criterion)
    for axis in axes:
        assert len(scores[axis]) == 3
        expected = torch.tensor(literal(model, name, 1, axis, criterion, gradients))
        assert torch.allclose(scores[axis][1], expected, rtol=1e-4)
        assert scores[axis][1].dtype == torch.float32


def test_one_module_has_gradients_at_a_time() -> None:
    model = tiny_model("llama")
    alive: dict[str, weakref.ref[Tensor]] = {}

    def gradient(name: str) -> Tensor:
        path = name.rpartition(".")[0]
        others = [key for key, tensor in alive.items() if tensor() is not None]
        assert all(key.startswith(path) for key in others), (name, others)
        value = torch.ones_like(model.get_parameter(name), requires_grad=False)
        alive[name] = weakref.ref(value)
        return value

    statistics = statistics_of(model, BOTH, batches())
    feature_map_scores(model, Structure.of(model), BOTH, statistics, gradient)
    expected = scored_parts(model, Structure.of(model), BOTH)
    assert set(alive) == {name for layer in expected for name in parameter_names(model, layer)}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", PLACES)
def test_back_propagated_gradients_give_the_ablation(name: str, criterion: Any) -> None:
    model: Any = tiny_model(name)
    (batch, *_) = batches()
    structure, statistics = Structure.of(model), statistics_of(model, BOTH, batches())
    scores = backprop_scores(model, structure, BOTH, statistics, [batch], criterion)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    expected = feature_map_scores(
        model, structure, BOTH, statistics, lambda key: gradients[key], criterion
    )
    for axis in BOTH:
        for one, two in zip(scores[axis], expected[axis], strict=True):
            assert torch.allclose(one, two, rtol=1e-3)


def test_windows_of_two_processes_become_one_batch_without_padding_in_the_loss() -> None:
    def window(*ids: int) -> dict[str, Any]:
        return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}

    shares = [[(0, window(5, 6, 7)), (2, window(8, 9))], [(1, window(10, 11, 12))]]
    rows: list[Any] = []
    for share in shares:
        together(share, 4, 3, torch.device("cpu"), lambda t: rows.append(t) or t)
    found = together(shares[0], 4, 3, torch.device("cpu"), lambda _: rows[0] + rows[1])
    assert found["input_ids"].tolist() == [[5, 6, 7], [10, 11, 12], [8, 9, 0]]
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    assert found["labels"].tolist() == [[5, 6, 7], [10, 11, 12], [8, 9, -100]]


@pytest.mark.parametrize("padded", [False, True])
def test_statistics_are_those_of_plain_passes(padded: bool) -> None:
    model = tiny_model("llama").train()
    data = batches()
    if padded:
        data[0]["attention_mask"][1, 6:] = 0
        data[0]["input_ids"][1, 6:] = 0
    statistics = statistics_of(model, BOTH, data)
    masks = torch.cat([batch["attention_mask"].flatten() for batch in data]).bool()
    model.eval()
    assert len(statistics) == 21
    for path, found in statistics.items():
        rows = inputs_of(model, path, data)[masks]
        assert torch.allclose(found.norms(), rows.norm(dim=0), rtol=1e-4)
        assert found.tokens == len(rows)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("axes", [BOTH, ("query",)])
def test_a_gate_scores_its_slope_times_its_columns(axes: tuple[str, ...]) -> None:
    model = tiny_model("llama")
    structure, statistics = Structure.of(model), statistics_of(model, axes, batches())
    noise, slopes = GateNoise(model, structure, axes, 0), torch.tensor([0.3, -2.0, 0.1])
    scores = gate_scores(model, structure, axes, statistics, noise, slopes)
    for axis in axes:
        path = structure.readers(model, axis, 2)[0].path
        weight, x = columns(model, path), inputs_of(model, path, batches())
        found = scores[axis][2]
        assert found.dim() == (2 if axis in PER_GROUP else 1)
        slope = noise.gradient(2, axis, slopes).flatten()
        entries = weight.shape[1] // len(slope)
        for unit, value in enumerate(found.flatten().tolist()):
            total = sum(
                float(x[:, j].norm()) * float(weight[:, j].abs().sum())
                for j in range(unit * entries, (unit + 1) * entries)
            )
            assert value == pytest.approx(abs(float(slope[unit])) * total, rel=1e-4)


def test_every_axis_names_what_it_owns() -> None:
    model = tiny_model("llama")
    roles = {
        axis: {part.role for part in scored_parts(model, Structure.of(model), (axis,))[0]}
        for axis in ("channel", "group", "query", "value")
    }
    assert roles == {
        "channel": {"gate", "up", "down"},
        "group": {"query", "key", "value", "output"},
        "query": {"query", "output"},
        "value": {"value", "output"},
    }


def test_gradients_of_several_batches_are_those_of_their_tokens() -> None:
    model: Any = tiny_model("llama")
    structure, (first, second) = Structure.of(model), batches()
    first["attention_mask"][1:, 4:] = 0  # so that a batch counts less than the other
    whole = {name: torch.cat([first[name], second[name]]) for name in first}
    statistics = statistics_of(model, BOTH, [first, second])
    expected = backprop_scores(model, structure, BOTH, statistics, [whole])
    for parts in ([first, second], batches_of(whole, 4), batches_of(whole, 1)):
        found = backprop_scores(model, structure, BOTH, statistics, parts)
        for axis in BOTH:
            for one, two in zip(found[axis], expected[axis], strict=True):
                assert torch.allclose(one, two, rtol=1e-3)


def test_batches_are_parted_in_order() -> None:
    parts = batches_of({"input_ids": torch.arange(5)[:, None]}, 2)
    assert [part["input_ids"].flatten().tolist() for part in parts] == [[0, 1], [2, 3], [4]]
