"""Unit scales on the way through a model against least squares on collected activations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import Ranks, Restoration, as_decided, prune_layers
from lit_prune.notes import noting
from lit_prune.structure import Layout, Structure
from tests.literal_fasp import columns
from tests.structure.layouts import cuttable
from tests.structure.tiny import tiny_model

Batch = dict[str, Tensor]

#: Post-norms stand between the blocks and the stream: only a block's own loss is made up for.
APART = {"gemma2", "gemma3", "opt-factorised"}


def batches(seed: int = 0, *, padded: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in (24, 17):
        ids = torch.randint(3, 61, (4, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, 15:] = 0
        result.append({"input_ids": ids * mask, "attention_mask": mask})
    return result


def layout_of(structure: Structure, axes: tuple[str, ...], gone: int = 4) -> Layout:
    """Other units in each layer, and a layer that keeps all."""
    generator = torch.Generator().manual_seed(1)
    layout = Layout.full(structure.widths)
    for layer in (0, 2):
        sizes, keep = structure.widths.layers[layer], {}
        for axis in axes:
            rows = sizes["group"] if axis in ("query", "value") else 1
            number = sizes[axis] - (gone + layer if axis == "channel" else 1)
            kept = [torch.randperm(sizes[axis], generator=generator)[:number] for _ in range(rows)]
            keep[axis] = torch.stack([k.sort().values for k in kept])
            keep[axis] = keep[axis] if axis in ("query", "value") else keep[axis][0]
        layout = layout.replace_layer(layer, keep)
    return layout


def tuned(
    model: Any, layout: Layout, data: list[Batch] | None = None, ranks: Ranks | None = None
) -> Structure:
    structure = Structure.of(model)
    data = batches() if data is None else data
    streams = [Stream(model, structure, data) for _ in range(2)]
    prune_layers(
        model,
        structure,
        streams[0],
        as_decided(layout),
        ("group", "query", "value", "channel"),
        restoration=Restoration("unit_scales"),
        dense=streams[1],
        ranks=ranks,
    )
    return structure


@torch.no_grad()
def traced(model: Any, modules: dict[str, nn.Module], data: list[Batch]) -> dict[str, Tensor]:
    """What modules read (`name <`) and put out (`name >`), [tokens, features], without padding."""
    seen: dict[str, list[Tensor]] = {}
    valid: list[Tensor] = []

    def keep(name: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple) else x
        seen.setdefault(name, []).append(x.flatten(0, -2)[valid[-1]].clone())

    handles = []
    for name, module in modules.items():
        handles.append(
            module.register_forward_hook(
                lambda _m, args, kwargs, y, n=name: (
                    keep(f"{n} <", args or kwargs["hidden_states"]),
                    keep(f"{n} >", y),
                    None,
                )[2],
                with_kwargs=True,
            )
        )
    for batch in data:
        valid.append(batch["attention_mask"].flatten().bool())
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


def literal(
    model: Any, structure: Structure, layout: Layout, data: list[Batch], apart: bool
) -> None:
    """Zero the columns that go and scale each unit's others, block by block."""
    dense = copy.deepcopy(model)
    for unit in layout.layers:
        sizes, layer = structure.widths.layers[unit.source], unit.source
        paths = {
            name: structure.readers(model, axis, layer)[0].path
            for name, axis in (("attention", "group"), ("ffn", "channel"))
        }
        for name, path in paths.items():
            axes = [axis for axis in unit.keep if (axis == "channel") == (name == "ffn")]
            if not axes:
                continue
            runs = []
            for run in (dense, model):
                modules = {key: run.get_submodule(p) for key, p in paths.items()}
                runs.append(traced(run, {**modules, "layer": structure.layers(run)[layer]}, data))
            before, now = runs
            if apart:
                target = before[f"{name} >"]
            else:  # the dense stream behind the block, and the pruned one before it
                target = before["layer >"] - now["layer <"]
                target -= before["ffn >"] if name == "attention" else now["attention >"]
            x, weight = now[f"{name} <"], columns(model, path)
            bias = getattr(model.get_submodule(path), "bias", None)
            target = target if bias is None else target - bias
            owners = kept_owners(axes, unit.keep, sizes, x.shape[1])
            units = sorted({owner for owner in owners if owner is not None})
            mine = [[j for j, owner in enumerate(owners) if owner == u] for u in units]
            a = torch.stack([(x[:, j] @ weight[:, j].T).flatten() for j in mine], 1)
            ridge = (0.01 * a.square().sum(0).mean()).sqrt() * torch.eye(len(mine), dtype=a.dtype)
            rest = torch.cat([target.flatten() - a.sum(1), a.new_zeros(len(mine))])
            scales = 1 + torch.linalg.lstsq(torch.cat([a, ridge]), rest).solution
            assert scales.abs().max() < 10
            assert (scales - 1).abs().max() > 0.01
            weight[:, [j for j, owner in enumerate(owners) if owner is None]] = 0
            for j, scale in zip(mine, scales, strict=True):
                weight[:, j] *= scale


def kept_owners(axes: list[str], keep: dict[str, Tensor], sizes: Any, inputs: int) -> list[Any]:
    """The head or channel of each column, None for those that go."""
    owners: list[Any] = []
    for column in range(inputs):
        if axes == ["channel"]:
            owners.append(column if column in keep["channel"] else None)
            continue
        head, entry = divmod(column, sizes["value"])
        group, query = divmod(head, sizes["query"])
        (axis,) = axes
        stays = {
            "group": group in keep[axis],
            "query": axis != "query" or query in keep[axis][group],
            "value": axis != "value" or entry in keep[axis][group],
        }[axis]
        owners.append(head if stays else None)
    return owners


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batches(9)[0]["input_ids"], use_cache=False).logits


def check(name: str, axes: tuple[str, ...], *, padded: bool = False) -> None:
    model, reference = tiny_model(name), tiny_model(name).double()
    structure, dense = Structure.of(reference), logits(model)
    axes = tuple(axis for axis in axes if axis in cuttable(structure))
    layout = layout_of(structure, axes)
    literal(reference, structure, layout, batches(padded=padded), name in APART)
    left = tuned(model, layout, batches(padded=padded))
    for layer in (0, 2):
        for axis in axes:
            path = left.readers(model, axis, layer)[0].path
            expected = columns(reference, path)
            expected = expected[:, expected.abs().sum(0) != 0]
            assert torch.allclose(columns(model, path).double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(logits(model).double(), logits(reference), atol=5e-3)
    assert (logits(model) - dense).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "axes", [("channel",), ("group",), ("query", "channel"), ("value", "channel")]
)
def test_it_is_least_squares_block_by_block(axes: tuple[str, ...], padded: bool) -> None:
    check("llama", axes, padded=padded)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "bloom", "falcon-7b", "falcon-new", "falcon-rw", "opt", "phi3"]
)
def test_it_is_least_squares_in_other_families(name: str, padded: bool) -> None:
    axes = ("query" if name.startswith("falcon-7") else "group", "channel")
    check(name, axes, padded=padded)


@pytest.mark.parametrize("name", sorted(APART))
def test_where_norms_follow_the_blocks_each_makes_up_for_itself(name: str) -> None:
    check(name, ("group", "channel"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "falcon-7b", "opt"])
def test_where_nothing_goes_nothing_changes(name: str) -> None:
    model, dense = tiny_model(name), tiny_model(name)
    structure = Structure.of(dense)
    layout = Layout.full(structure.widths)
    for layer, sizes in enumerate(structure.widths.layers):
        keep = {"channel": torch.arange(sizes["channel"]), "group": torch.arange(sizes["group"])}
        layout = layout.replace_layer(layer, keep)
    tuned(model, layout)
    for (key, value), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.allclose(value, expected, rtol=2e-4, atol=1e-6), key


def test_a_scale_beyond_ten_ends_the_tuning() -> None:
    model, structure = tiny_model("llama"), Structure.of(tiny_model("llama"))
    # in layer 2 what stays is a faint copy of what goes: its scale would be about 50
    down = columns(model, "model.layers.2.mlp.down_proj")
    for name in ("gate_proj", "up_proj"):
        for kind in ("weight", "bias"):
            values = model.get_parameter(f"model.layers.2.mlp.{name}.{kind}").data
            values[10:] = values[:10]
    down[:, :10] = down[:, 10:] / 50
    before = copy.deepcopy(model)
    layout = Layout.full(structure.widths)
    for layer in (0, 2):
        layout = layout.replace_layer(layer, {"channel": torch.arange(10)})
    path = "model.layers.{}.mlp.down_proj"
    text = f"scale at {path.format(2)} is beyond 10; neither it nor any block behind it is tuned"
    with noting() as notes, pytest.warns(UserWarning, match=text):
        tuned(model, layout)
    assert len(notes) == 1
    kept = columns(before, "model.layers.2.mlp.down_proj")[:, :10]
    assert torch.equal(columns(model, "model.layers.2.mlp.down_proj"), kept)
    kept = columns(before, "model.layers.0.mlp.down_proj")[:, :10]
    assert not torch.allclose(columns(model, "model.layers.0.mlp.down_proj"), kept, rtol=1e-2)
    # and where it is the first block, no other is tuned either
    planted = copy.deepcopy(before)
    layers = planted.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    layers[0], layers[2] = copy.deepcopy(layers[2]), copy.deepcopy(layers[0])
    for number, layer in enumerate(layers):
        layer.get_submodule("self_attn").layer_idx = number  # pyright: ignore
    whole = copy.deepcopy(planted)
    with pytest.warns(UserWarning, match=f"a unit scale at {path.format(0)} is beyond 10"):
        tuned(planted, layout)
    for layer in (0, 2):
        name = path.format(layer)
        assert torch.equal(columns(planted, name), columns(whole, name)[:, :10])


def test_processes_add_what_they_have_seen() -> None:
    alone = tiny_model("llama")
    layout = layout_of(Structure.of(alone), ("query", "channel"))
    tuned(alone, layout)
    # the second process first, which keeps what it has seen of the pruned model
    parts: list[Tensor] = []
    tuned(tiny_model("llama"), layout, ranks=Ranks(reduce=lambda x: parts.append(x.clone()) or x))
    rest, model = iter(parts), tiny_model("llama")
    tuned(model, layout, [], Ranks(reduce=lambda x: x + next(rest)))
    assert next(rest, None) is None
    assert torch.equal(logits(model), logits(alone))


def test_a_dense_stream_is_needed() -> None:
    model = tiny_model("llama")
    structure = Structure.of(model)
    layout = layout_of(structure, ("channel",))
    with pytest.raises(TypeError, match="expected a dense stream"):
        prune_layers(
            model,
            structure,
            Stream(model, structure, batches()),
            as_decided(layout),
            ("channel",),
            restoration=Restoration("unit_scales"),
        )
