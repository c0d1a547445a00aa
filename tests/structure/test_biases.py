"""Biases where a family has none, from the model in memory to its checkpoint and the next cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint, load_pruned
from lit_prune.recovery.lora import attach_lora, merge_lora
from lit_prune.structure import LayerUnits, Layout, Structure, cut, settle
from lit_prune.structure.biases import add_bias, add_biases, biased
from lit_prune.structure.counting import count, count_actual, unique_labels
from tests.structure.layouts import varied
from tests.structure.tiny import FAMILIES, tiny_model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 61, (2, 10), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def with_biases(name: str, **options: Any) -> tuple[Any, Structure, list[str]]:
    """A model whose O and down of layers 0 and 2 got biases that differ."""
    model = tiny_model(name, **options)
    structure = Structure.of(model)
    paths = [
        structure.readers(model, axis, layer)[0].path
        for layer in (0, 2)
        for axis in ("group", "channel")
    ]
    for path in paths:
        module = model.get_submodule(path)
        add_bias(module)
        assert not module.get_parameter("bias").any() or name != "llama-tied"
        module.get_parameter("bias").data.normal_(generator=torch.Generator().manual_seed(3))
    return model, structure, paths


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bias_of_zeros_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    structure, expected = Structure.of(model), logits(model)
    for axis in ("group", "channel"):
        module = model.get_submodule(structure.readers(model, axis, 1)[0].path)
        before = getattr(module, "bias", None)
        add_bias(module)
        bias = module.get_parameter("bias")
        assert bias is before or not bias.any()
        add_bias(module)
        assert module.get_parameter("bias") is bias
    structure.check(model)
    assert torch.equal(logits(model), expected)
    assert count(unique_labels(model, structure), structure.widths) == count_actual(
        model, structure
    )


@pytest.mark.parametrize("trained", [True, False])
def test_a_bias_is_like_its_weight(trained: bool) -> None:
    module = nn.Linear(3, 5, bias=False, dtype=torch.bfloat16, device="meta")
    module.requires_grad_(trained)
    add_bias(module)
    assert module.bias.shape == (5,)
    assert (module.bias.dtype, module.bias.device.type) == (torch.bfloat16, "meta")
    assert module.bias.requires_grad is trained
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


def test_what_is_not_linear_gets_none() -> None:
    model: Any = tiny_model("llama-tied")
    attach_lora(
        model,
        rank=2,
        alpha=4.0,
        targets=["model.layers.0.mlp.down_proj"],
        dtype=torch.float32,
        seed=0,
    )
    for module in (model.model.norm, model.model.layers[0].mlp.down_proj):
        with pytest.raises(UserError, match="expected a linear module to add a bias to, got"):
            add_bias(module)


def test_a_bias_is_added_to_each_output() -> None:
    model, _, paths = with_biases("llama-tied")
    module = model.get_submodule(paths[1])
    x = torch.randn(4, 20)
    expected = [[(row @ w + b).item() for w, b in zip(module.weight, module.bias)] for row in x]  # noqa: B905
    assert torch.allclose(module(x), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "phi3", "falcon-new"])
def test_biases_follow_later_cuts(name: str) -> None:
    model, structure, paths = with_biases(name)
    biases = {path: model.get_submodule(path).bias for path in paths}
    layers = tuple(LayerUnits(i, {"channel": torch.tensor([0, 2, 5])}) for i in (1, 2))
    kept = torch.arange(0, structure.widths.shared["hidden"], 2)
    cut(model, structure, Layout(structure.widths.copy(), kept, layers))
    left = [path.replace(".2.", ".1.") for path in paths[2:]]
    assert biased(model, structure) == sorted(left, key=biased(model, structure).index)
    for old, new in zip(paths[2:], left, strict=True):
        assert torch.equal(model.get_submodule(new).bias, biases[old][kept])
    Structure.of(model, structure.widths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "phi3", "glm"])
@pytest.mark.parametrize("axes", [[], ["channel", "value"]], ids=["dense", "cut"])
def test_reload_is_before_and_can_be_cut_again(
    name: str, dtype: torch.dtype, axes: list[str], tmp_path: Path
) -> None:
    model, structure, _ = with_biases(name, dtype=dtype)
    layout = varied(structure, axes)
    cut(model, structure, layout)
    assert not settle(model, structure, layout)
    export_checkpoint(
        model,
        None,
        tmp_path / "out",
        config=model.config,
        layout=layout.to_dict(),
        lineage=[],
        card="",
    )
    read = load_pruned(tmp_path / "out")
    assert read.dtype == dtype
    assert all(parameter.dtype == dtype for parameter in read.parameters())
    assert torch.equal(logits(read), logits(model))
    again = Structure.of(read)
    assert again.widths == structure.widths
    assert biased(read, again) == biased(model, structure) != []
    for which, its in ((model, structure), (read, again)):
        cut(which, its, varied(its, ["channel", "group", "hidden"], seed=5))
    assert torch.equal(logits(read), logits(model))


def test_biases_are_listed_and_added_to_another_model() -> None:
    model, structure, paths = with_biases("qwen2")
    stock = tiny_model("qwen2")
    added = set(biased(model, structure)) - set(biased(stock, structure))
    assert added == set(paths)
    targets = [site.path for site in structure.sites(model) if "mlp" in site.path]
    before = biased(model, structure)
    attach_lora(model, rank=2, alpha=4.0, targets=targets, dtype=torch.float32, seed=0)
    assert biased(model, structure) == before
    merge_lora(model)
    add_biases(stock, before)
    assert biased(stock, structure) == before
    stock.load_state_dict(model.state_dict())
    assert torch.equal(logits(stock), logits(model))
