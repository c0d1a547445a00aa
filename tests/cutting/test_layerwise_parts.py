"""What walks through layers share: biases that restore, choices, scores and dense statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_prune.allocation.plan import Plan
from lit_prune.calibration.moments import dense_statistics
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import (
    Choice,
    Ranks,
    Restoration,
    as_decided,
    by_columns,
    mean_output,
    prune_layers,
    unit_scores,
)
from lit_prune.scores import column_scores
from lit_prune.structure import Layout, Structure
from lit_prune.structure.biases import biased
from tests.literal_fasp import columns
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model

Batch = dict[str, Tensor]


def batches(seed: int = 0) -> list[Batch]:
    """Two batches, with padding in the first."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in (11, 8):
        ids = torch.randint(3, 61, (3, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 8:] = 0
        result.append({"input_ids": ids * mask, "attention_mask": mask})
    return result


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.cat(
        [
            model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
            for batch in batches(9)
        ]
    )


@torch.no_grad()
def inputs_of(model: Any, path: str) -> Tensor:
    """What a module reads in plain forward passes, without padding, [tokens, features]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append(args[0].flatten(0, -2))
    )
    for batch in batches():
        model(**batch, use_cache=False)
    handle.remove()
    valid = [batch["attention_mask"].flatten().bool() for batch in batches()]
    return torch.cat([x[rows] for x, rows in zip(seen, valid, strict=True)])


def gone_columns(axis: str, kept: Tensor, sizes: dict[str, int]) -> list[int]:
    """The columns of O or down that belong to units that go."""
    if axis == "channel":
        return [j for j in range(sizes["channel"]) if j not in kept]
    gone = []
    for j in range(sizes["group"] * sizes["query"] * sizes["value"]):
        head, entry = divmod(j, sizes["value"])
        group, query = divmod(head, sizes["query"])
        stays = {
            "group": lambda g=group: g in kept,
            "query": lambda g=group, q=query: q in kept[g],
            "value": lambda g=group, e=entry: e in kept[g],
        }
        gone += [] if stays[axis]() else [j]
    return gone


def at_their_mean(model: Any, structure: Structure, layout: Layout, *, dense: bool) -> None:
    """Make readers see the mean of each column that goes, in the dense or the pruned model."""
    means = {
        path: inputs_of(model, path).mean(0)
        for unit in layout.layers
        for axis in unit.keep
        for path in [structure.readers(model, axis, unit.source)[0].path]
    }
    for unit in layout.layers:
        for axis in ("group", "query", "value", "channel"):
            if axis not in unit.keep:
                continue
            path = structure.readers(model, axis, unit.source)[0].path
            mean = means[path] if dense else inputs_of(model, path).mean(0)
            gone = gone_columns(axis, unit.keep[axis], structure.widths.layers[unit.source])

            def hook(module: nn.Module, args: Any, gone: Any = gone, mean: Tensor = mean) -> Any:
                x = args[0].clone()
                x[..., gone] = mean[gone]
                return (x,)

            model.get_submodule(path).register_forward_pre_hook(hook)


def cases() -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for name in FAMILIES:
        possible = cuttable(Structure.of(tiny_model(name)))
        heads = [axis for axis in ("group", "query", "value") if axis in possible]
        found += [(name, (axis, "channel")) for axis in heads]
    return found


CASES = cases()


@pytest.mark.parametrize(("name", "axes"), CASES, ids=[f"{n}-{a[0]}" for n, a in CASES])
def test_a_bias_puts_removed_columns_at_their_mean(name: str, axes: tuple[str, ...]) -> None:
    model, reference = tiny_model(name), tiny_model(name).double()
    structure = Structure.of(model)
    layout, dense = varied(structure, axes), logits(model)
    at_their_mean(reference, Structure.of(reference), layout, dense=False)
    found = prune_layers(
        model,
        structure,
        Stream(model, structure, batches()),
        as_decided(layout),
        axes,
        restoration=Restoration("bias"),
    )
    assert found.to_dict() == layout.to_dict()
    assert torch.allclose(logits(model).double(), logits(reference), atol=2e-4)
    assert (logits(model) - dense).abs().max() > 0.1
    readers = {structure.readers(model, a, n)[0].path for a in axes for n in range(3)}
    assert readers <= set(biased(model, structure))


def test_only_readers_that_lose_columns_get_a_bias() -> None:
    model, dense = tiny_model("llama-tied"), tiny_model("llama-tied")
    structure = Structure.of(model)
    layout = Layout.full(structure.widths).replace_layer(1, {"channel": torch.arange(3, 20)})
    assert not biased(model, structure)
    prune_layers(
        model,
        structure,
        Stream(model, structure, batches()),
        as_decided(layout),
        ("group", "channel"),
        restoration=Restoration("bias"),
    )
    path = "model.layers.1.mlp.down_proj"
    assert biased(model, structure) == [path]
    mean = inputs_of(dense, path).double().mean(0)[:3]
    expected = columns(dense, path)[:, :3].double() @ mean
    assert torch.allclose(model.get_parameter(f"{path}.bias").double(), expected, atol=1e-5)
    assert torch.equal(columns(model, path), columns(dense, path)[:, 3:])


def test_mean_output_is_in_float32() -> None:
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    mean, removed = torch.arange(5.0) + 1.0001, torch.tensor([True, False, True, False, False])
    literal = [sum(float(row[j]) * float(mean[j]) for j in (0, 2)) for row in weight]
    found = mean_output(weight, mean, removed)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(literal)
    assert mean_output(weight, mean, torch.zeros(5, dtype=torch.bool)).tolist() == [0.0] * 3


class Products(TorchFunctionMode):
    """Notes with what precision matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "matmul" in getattr(func, "__name__", "") and args:
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_mean_output_is_exact_whatever_training_is_set_to() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with Products() as products:
            mean_output(torch.ones(3, 5), torch.ones(5), torch.ones(5, dtype=torch.bool))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert products.seen == ["highest"]


@pytest.mark.parametrize("kind", ["least_squares", "bias", "none"])
@pytest.mark.parametrize("axes", [("query", "channel"), ("value", "channel"), ("group",)])
def test_what_was_chosen_can_be_decided_beforehand(kind: Any, axes: tuple[str, ...]) -> None:
    plan = Plan({axis: [1, 0, 1] for axis in axes}, 0.0)
    models, layout = [], None
    for _ in range(2):
        model = tiny_model("llama")
        structure = Structure.of(model)
        choice = by_columns(structure, lambda w, x: column_scores(w, x.norms()), plan)
        layout = prune_layers(
            model,
            structure,
            Stream(model, structure, batches()),
            choice if layout is None else as_decided(layout),
            axes[::-1],
            restoration=Restoration(kind),
        )
        models.append(model)
        assert [len(unit.keep) for unit in layout.layers] == [len(axes), 0, len(axes)]
    pairs = zip(models[0].named_parameters(), models[1].named_parameters(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)


def test_heads_come_before_channels_and_what_is_whole_is_not_looked_at() -> None:
    model = tiny_model("llama")
    structure = Structure.of(model)
    asked: list[tuple[int, str]] = []

    def units(layer: int, axis: str, reader: nn.Module, seen: InputStatistics) -> Tensor:
        asked.append((layer, axis))
        assert reader is model.get_submodule(structure.readers(model, axis, layer)[0].path)
        assert seen.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches())
        return torch.tensor([0]) if axis == "group" else torch.arange(7)

    choice = Choice(lambda layer, axis: layer != 1, units)
    stream = Stream(model, structure, batches())
    prune_layers(model, structure, stream, choice, ("channel", "group"))
    assert asked == [(0, "group"), (0, "channel"), (2, "group"), (2, "channel")]
    assert [sizes["group"] for sizes in structure.widths.layers] == [1, 2, 1]
    assert [sizes["channel"] for sizes in structure.widths.layers] == [7, 20, 7]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-new", "falcon-7b"])
def test_column_scores_are_summed_over_a_units_columns(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    for axis in ("channel", "group", "query", "value"):
        if axis not in structure.axes():
            continue
        sizes, seen = structure.widths.layers[1], InputStatistics(1, "cpu")
        reader = model.get_submodule(structure.readers(model, axis, 1)[0].path)
        weight = columns(model, structure.readers(model, axis, 1)[0].path)
        score: Callable[..., Tensor] = lambda w, x: w.double().square().sum(0)  # noqa: E731
        found = unit_scores(structure, 1, axis, reader, seen, score)
        assert found.dtype == torch.float32
        whole = [torch.arange(sizes[axis])]
        if axis in ("query", "value"):
            whole = whole * sizes["group"]
        for group in range(len(whole)):
            for unit in range(sizes[axis]):
                less = [list(rows.tolist()) for rows in whole]
                less[group].remove(unit)
                keep: Any = less if len(whole) > 1 or axis in ("query", "value") else less[0]
                gone = gone_columns(axis, keep, sizes)
                value = found[group, unit] if found.dim() == 2 else found[unit]
                expected = weight.double()[:, gone].square().sum()
                assert value.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_statistics_are_those_of_all_readers(name: str) -> None:
    model = tiny_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    structure = Structure.of(model)
    reduced: list[Tensor] = []
    found = dense_statistics(
        model,
        structure,
        Stream(model, structure, batches()),
        ["channel", "query", "group"] if "query" in structure.axes() else ["channel", "group"],
        ranks=Ranks(reduce=lambda x: reduced.append(x) or x),
    )
    assert model.training
    model.eval()
    for (layer, axis), statistics in found.items():
        x = inputs_of(model, structure.readers(model, axis, layer)[0].path).double()
        assert statistics.tokens == len(x)
        assert torch.allclose(statistics.mean.double(), x.mean(0), atol=1e-5)
        assert torch.allclose(
            statistics.variance.double(), x.var(0, correction=0), rtol=1e-4, atol=1e-6
        )
        assert statistics.gram is None
        assert layer < 3
    assert len(found) == 3 * (2 + ("query" in structure.axes()))
    assert all(found[n, "query"] is found[n, "group"] for n in range(3) if (n, "query") in found), (
        "they have one reader"
    )
    assert len(reduced) == 3 * 2 * 3, "three sums for each of two readers in three layers"
