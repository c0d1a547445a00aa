"""Cutting against masking, for every family and every axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.structure import AXES, LayerUnits, Layout, Structure, cut, cut_layer, settle
from lit_prune.structure.counting import count, count_actual, unique_labels
from lit_prune.structure.gates import masked
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model

_GROUPED = [name for name in FAMILIES if "num_key_value_heads" in FAMILIES[name][1]]
#: Axes of which a family has none or a single unit.
UNCUTTABLE: dict[str, set[str]] = {name: set() for name in _GROUPED} | {
    "gpt2": {"query"},
    "gpt_neox": {"query", "value"},  # one module makes queries, keys and values in turn
    "bloom": {"query", "value"},
    "falcon-new": {"value"},
    "falcon-7b": {"group", "value"},  # all heads share one
    "falcon-rw": {"query", "value"},
    "opt": {"query"},
    "opt-factorised": {"query"},
}
#: Their RMS norms compute in float32 whatever the model's dtype is, and cutting `hidden` changes
#: what norms sum. Gpt2, gpt_neox, bloom, falcon and opt run in float64 throughout.
NORMS_IN_FLOAT32 = set(_GROUPED)
CASES = [
    (name, axes)
    for name in FAMILIES
    for axes in [*([axis] for axis in AXES if axis not in UNCUTTABLE[name]), ["all"]]
]
IDS = [f"{name}-{axes[0]}" for name, axes in CASES]
IN_FLOAT64 = [
    (name, axes) for name, axes in CASES if axes != ["hidden"] or name not in NORMS_IN_FLOAT32
]


def built(name: str, axes: list[str], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    model = tiny_model(name, dtype=dtype)
    structure = Structure.of(model)
    chosen = cuttable(structure) if axes == ["all"] else axes
    return model, structure, varied(structure, chosen)


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    ids = tokens() if ids is None else ids
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_can_be_cut_is_known(name: str) -> None:
    structure = Structure.of(tiny_model(name))
    assert set(cuttable(structure)) == set(AXES) - UNCUTTABLE[name]


@pytest.mark.parametrize(("name", "axes"), CASES, ids=IDS)
def test_masked_and_cut_models_agree(name: str, axes: list[str]) -> None:
    model, structure, layout = built(name, axes)
    dense = logits(model)
    with masked(model, structure, layout):
        expected = logits(model)
    assert difference(dense, expected) > 0.05, "the mask must change what it is compared by"
    cut(model, structure, layout)
    settle(model, structure, layout)
    assert difference(logits(model), expected) <= 1e-5
    assert structure.widths == layout.widths()


@pytest.mark.parametrize(("name", "axes"), IN_FLOAT64, ids=[f"{n}-{a[0]}" for n, a in IN_FLOAT64])
def test_they_agree_in_float64(name: str, axes: list[str]) -> None:
    model, structure, layout = built(name, axes, torch.float64)
    if name in NORMS_IN_FLOAT32:
        layout = Layout(layout.of, None, layout.layers)
    with masked(model, structure, layout):
        expected = logits(model)
    cut(model, structure, layout)
    settle(model, structure, layout)
    assert expected.dtype == torch.float64
    assert difference(logits(model), expected) <= 1e-9


@pytest.mark.parametrize(("name", "axes"), CASES, ids=IDS)
def test_a_cut_model_is_whole(name: str, axes: list[str]) -> None:
    model, structure, layout = built(name, axes)
    before = ties(model)
    numbers = {None: None, **{unit.source: new for new, unit in enumerate(layout.layers)}}
    labels = [x for x in unique_labels(model, structure) if x.layer in numbers]
    left = [replace(label, layer=numbers[label.layer]) for label in labels]
    predicted = [count(left, layout.widths(), decoder=decoder) for decoder in (True, False)]
    dense = [count_actual(model, structure, decoder=decoder) for decoder in (True, False)]
    cut(model, structure, layout)
    settle(model, structure, layout)
    actual = [count_actual(model, structure, decoder=decoder) for decoder in (True, False)]
    assert predicted == actual
    assert all(a < b for a, b in zip(actual, dense, strict=True))
    assert ties(model) == before
    labels = {label.name for label in Structure.of(model, structure.widths).labels(model)}
    assert labels == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize(("name", "axes"), CASES, ids=IDS)
def test_a_cut_model_generates_with_a_cache(name: str, axes: list[str]) -> None:
    model, structure, layout = built(name, axes)
    cut(model, structure, layout)
    settle(model, structure, layout)
    ids = tokens(length=4)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        eos_token_id=None,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert made.sequences.shape == (2, 20)
    full = logits(model, made.sequences)[:, 3:-1]
    assert torch.equal(full.argmax(-1), made.sequences[:, 4:])
    assert difference(torch.stack(made.logits, 1), full) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_two_cuts_equal_the_joint_one(name: str) -> None:
    model, structure, first = built(name, ["all"])
    twin = tiny_model(name)
    cut(model, structure, first)
    settle(model, structure, first)
    axes = {"channel", "query", "value", "hidden"} - UNCUTTABLE[name]
    second = varied(structure, sorted(axes), seed=7)
    cut(model, structure, second)
    settle(model, structure, second)
    joint, twins = first.then(second), Structure.of(twin)
    cut(twin, twins, joint)
    settle(twin, twins, joint)
    assert twins.widths == structure.widths
    assert difference(logits(model), logits(twin)) <= 1e-5


VALUES = [name for name in FAMILIES if "value" not in UNCUTTABLE[name]]


@pytest.mark.parametrize("with_axes", [["group"], ["query"], ["group", "query"]], ids="-".join)
@pytest.mark.parametrize("name", VALUES)
def test_values_go_together_with_heads(name: str, with_axes: list[str]) -> None:
    if set(with_axes) & UNCUTTABLE[name]:
        return
    model, structure, layout = built(name, ["value", *with_axes], torch.float64)
    with masked(model, structure, layout):
        expected = logits(model)
    cut(model, structure, layout)
    assert not settle(model, structure, layout)
    assert difference(logits(model), expected) <= (1e-6 if name in NORMS_IN_FLOAT32 else 1e-9)
    for attention in ("sdpa", "eager") if model._supports_sdpa else ("eager",):
        other = tiny_model(name, dtype=torch.float64, attn_implementation=attention)
        cut(other, Structure.of(other), layout)
        assert difference(logits(other), expected) <= 1e-5  # eager has its softmax in float32


@pytest.mark.parametrize("order", [["value", "group"], ["group", "value"], ["query", "value"]])
@pytest.mark.parametrize("name", VALUES)
def test_values_go_before_and_after_heads(name: str, order: list[str]) -> None:
    if set(order) & UNCUTTABLE[name]:
        return
    model, structure, _ = built(name, [])
    joint = Layout.full(structure.widths)
    for step, axis in enumerate([*order, "value"]):
        layout = varied(structure, [axis], seed=step)
        with masked(model, structure, layout):
            expected = logits(model)
        cut(model, structure, layout)
        settle(model, structure, layout)
        assert difference(logits(model), expected) <= 1e-5
        joint = joint.then(layout)
    assert Layout.from_dict(joint.to_dict()).widths() == structure.widths == joint.widths()
    dense = tiny_model(name)
    with masked(dense, Structure.of(dense), joint):
        assert difference(logits(model), logits(dense)) <= 1e-5


def test_keeping_all_values_needs_no_hook() -> None:
    model, structure, _ = built("llama", [])
    keep = {"value": torch.arange(8).expand(2, -1)}
    layout = Layout.full(structure.widths).replace_layer(1, keep)
    cut(model, structure, layout)
    assert settle(model, structure, layout)


def test_heads_with_alibi_biases_can_be_cut_twice() -> None:
    for name in ("bloom", "falcon-rw"):
        model, structure, first = built(name, [])
        layers = [{"group": torch.tensor(kept)} for kept in ([0, 2, 3], [1, 2, 3], [0, 1, 3])]
        for keep in (layers, [{"group": torch.tensor([1, 2])}] * 3):
            units = tuple(LayerUnits(i, kept) for i, kept in enumerate(keep))
            step = Layout(structure.widths.copy(), None, units)
            first = first.then(step)
            cut(model, structure, step)
            settle(model, structure, step)
        dense = tiny_model(name)
        with masked(dense, Structure.of(dense), first):
            assert difference(logits(dense), logits(model)) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "bloom", "falcon-rw"])
def test_they_agree_on_padded_batches(name: str) -> None:
    model, structure, layout = built(name, ["all"])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with masked(model, structure, layout):
        expected = logits(model, mask=mask)[mask.bool()]
    cut(model, structure, layout)
    settle(model, structure, layout)
    found = logits(model, mask=mask)
    assert difference(found[mask.bool()], expected) <= 1e-5
    alone = logits(model, tokens()[1:, :7])
    assert difference(found[1:, :7], alone) <= 1e-5


@pytest.mark.parametrize("kept", [(1, 2), (1,), (0, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_layers_may_go(name: str, kept: tuple[int, ...]) -> None:
    model, structure, _ = built(name, [])
    layout = Layout(structure.widths.copy(), None, tuple(LayerUnits(i) for i in kept))
    with masked(model, structure, layout):
        expected = logits(model)
    cut(model, structure, layout)
    assert settle(model, structure, layout)
    assert model.config.num_hidden_layers == len(kept)
    assert difference(logits(model), expected) <= 1e-5
    ids = tokens(length=8)
    made = model.generate(ids, max_new_tokens=4, eos_token_id=None, do_sample=False)
    assert torch.equal(logits(model, made)[:, 7:-1].argmax(-1), made[:, 8:])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_model_stays_frozen(name: str) -> None:
    model, structure, layout = built(name, ["all"])
    model.requires_grad_(False)
    cut(model, structure, layout)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_axis_that_a_family_lacks_is_refused() -> None:
    model = tiny_model("gpt2")
    structure = Structure.of(model)
    before = structure.widths.copy()
    for axis in ("query", "hidden", "chanel"):
        with pytest.raises(UserError, match=rf"gpt2 have \(channel, group, value\), got '{axis}'"):
            cut_layer(model, structure, 0, {axis: torch.tensor([[0]])})
    assert structure.widths == before
    layout = Layout.full(before).replace_layer(0, {"query": torch.tensor([[0]])})
    with pytest.raises(UserError, match="expected axes"):
        cut(model, structure, layout)
