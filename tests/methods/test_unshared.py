from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.gradients.folded import weight_gradients
from lit_prune.methods.unshared import unshared
from lit_prune.structure import Layout, Structure, cut
from tests.structure.tiny import FAMILIES, tiny_model

Rows = dict[str, Tensor]

#: Families in which query heads share keys, here three of them (four in falcon-7b, all in one).
SHARED = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "glm",
    "falcon-new",
    "falcon-7b",
)


def batch(padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: Any, padded: bool = True) -> Tensor:
    data = batch(padded)
    mask = data["attention_mask"]
    with torch.no_grad():
        output = model(
            input_ids=data["input_ids"], attention_mask=mask if padded else None, use_cache=False
        )
    return output.logits[mask.bool()]


def state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters by name, and every plain number that a module remembers."""
    numbers = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, bool))
    }
    return dict(model.named_parameters(remove_duplicate=False)), numbers  # pyright: ignore[reportReturnType]


def gradients(model: nn.Module, structure: Structure) -> dict[int, Rows]:
    found: dict[int, Rows] = {}

    def fold(number: int, loss: float, layer: int, weights: Rows, slopes: Rows) -> None:
        found[layer] = {name: tensor.clone() for name, tensor in slopes.items()}

    weight_gradients(model, structure, [batch()], fold)
    return found


def test_the_families_that_share_keys_are_all_here() -> None:
    found = {n for n in FAMILIES if Structure.of(tiny_model(n)).widths.layers[0]["query"] > 1}
    assert found - {"gemma2-untied"} == set(SHARED)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_model_computes_what_it_did(name: str, attention: str, padded: bool) -> None:
    model: Any = tiny_model(name)
    if attention == "eager" or not name.startswith("gemma2"):
        model.set_attn_implementation(attention)
    expected = logits(model, padded)
    with unshared(model, Structure.of(model)) as own:
        own.check(model)
        assert {sizes["query"] for sizes in own.widths.layers} == {1}
        torch.testing.assert_close(logits(model, padded), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_gradients_of_the_copies_add_up_to_the_shared_one(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    expected = gradients(model, structure)
    with unshared(model, structure) as own:
        found = gradients(model, own)
    sizes = structure.widths.layers[0]
    groups, query = sizes["group"], sizes["query"]
    for layer, rows in expected.items():
        for role, tensor in rows.items():
            got = found[layer][role]
            if role in ("key", "value"):
                assert got.shape == (groups * query, *tensor.shape[1:])
                copies = got.unflatten(0, (groups, query))
                assert not torch.allclose(copies[:, 0], copies[:, 1], rtol=1e-2)
                got = copies.sum(1)
            elif role in ("query", "output"):
                got = got.squeeze(1).unflatten(0, (groups, query))
            torch.testing.assert_close(got, tensor, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_everything_is_put_back(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    parameters, numbers = state(model)
    values = {key: p.detach().clone() for key, p in parameters.items()}

    def fail() -> None:
        with unshared(model, structure) as own:
            assert own.widths != structure.widths
            for key, parameter in model.named_parameters():
                assert parameter.requires_grad == parameters[key].requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    after, numbers_after = state(model)
    assert numbers_after == numbers
    assert after.keys() == parameters.keys()
    assert all(after[key] is parameters[key] for key in after)
    assert all(torch.equal(after[key], values[key]) for key in after)
    structure.check(model)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "falcon-rw", "opt"])
def test_where_nothing_is_shared_nothing_changes(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    before = dict(model.named_parameters())
    with unshared(model, structure) as own:
        assert own is structure
        assert all(p is before[key] for key, p in model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "phi3", "falcon-new"])
def test_layers_may_share_differently(name: str) -> None:
    """A model that was cut: one layer without sharing, one with fewer groups."""
    model = tiny_model(name)
    structure = Structure.of(model)
    query = structure.widths.layers[0]["query"]
    layout = Layout.full(structure.widths)
    layout = layout.replace_layer(0, {"query": torch.tensor([[0], [query - 1]])})
    layout = layout.replace_layer(2, {"group": torch.tensor([1])})
    cut(model, structure, layout)
    expected = logits(model)
    untouched = model.get_submodule(structure.layers_path + ".0")
    before = dict(untouched.named_parameters())
    with unshared(model, structure) as own:
        counts = [(sizes["group"], sizes["query"]) for sizes in own.widths.layers]
        assert counts == [(2, 1), (2 * query, 1), (query, 1)]
        own.check(model)
        assert all(p is before[key] for key, p in untouched.named_parameters())
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "glm"])
def test_values_may_be_narrower_than_keys(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    layout = Layout.full(structure.widths)
    groups = structure.widths.layers[1]["group"]
    layout = layout.replace_layer(1, {"value": torch.tensor([[0, 2, 3]] * groups)})
    cut(model, structure, layout)
    expected = logits(model)
    attention: Any = structure.layers(model)[1].get_submodule("self_attn")
    record = attention.lit_prune_values
    with unshared(model, structure) as own:
        own.check(model)
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    assert attention.lit_prune_values is record
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_the_default_device_makes_no_difference(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    expected = logits(model)
    # while a fit cuts, the default is the model's device
    with torch.device("meta"), unshared(model, structure) as own:
        own.check(model)
        with torch.device("cpu"):
            torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)


def test_attention_that_does_not_count_its_keys_is_refused() -> None:
    model: Any = tiny_model("llama")
    structure = Structure.of(model)
    before = dict(model.named_parameters())
    del model.model.layers[1].self_attn.num_key_value_groups
    refused = pytest.raises(UserError, match=r"num_key_value_groups.*got LlamaAttention")
    with refused as caught, unshared(model, structure):
        pass
    assert "\n" not in str(caught.value)
    assert all(p is before[key] for key, p in model.named_parameters())
