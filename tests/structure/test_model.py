from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from lit_prune.errors import UserError
from lit_prune.structure import Structure, known_types
from lit_prune.structure.families import FAMILIES as TABLE
from lit_prune.structure.families import find_family
from tests.structure.tiny import FAMILIES, tiny_config, tiny_model


def test_every_entry_of_the_table_has_a_tiny_model() -> None:
    tested = [find_family(tiny_config(name)) for name in FAMILIES]
    assert all(any(family is entry for family in tested) for entry in TABLE)
    assert known_types() == sorted({model_type for model_type, _ in FAMILIES.values()})


def test_an_unknown_family_is_refused_with_the_known_ones_and_the_place() -> None:
    config = AutoConfig.for_model("gptj", n_embd=32, n_layer=1, n_head=2, vocab_size=61)
    with pytest.raises(UserError) as caught:
        Structure.of_config(config)
    text = str(caught.value)
    assert "'gptj'" in text
    assert all(name in text for name in known_types())
    assert "lit_prune/structure/families.py" in text
    assert "\n" not in text


def test_a_parameter_that_the_table_lacks_is_refused() -> None:
    model = tiny_model("llama")
    model.get_submodule("model.layers.1.mlp").register_module("extra", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"got model\.layers\.1\.mlp\.extra\.weight of Llama"):
        Structure.of(model)


def test_a_parameter_of_another_shape_is_refused() -> None:
    model: Any = tiny_model("llama")
    model.config.intermediate_size += 1
    with pytest.raises(UserError, match=r"expected .*gate_proj.weight to be \(21, 36\)"):
        Structure.of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_readers_take_the_axis_in(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    seen: dict[str, int] = {}

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[paths[module]] = args[0].shape[-1]

    sites = [structure.readers(model, axis, 1) for axis in ("channel", "group")]
    assert [len(found) for found in sites] == [1, 1]
    paths = {model.get_submodule(found[0].path): found[0].path for found in sites}
    for module in paths:
        module.register_forward_pre_hook(hook)
    model(input_ids=torch.randint(3, 61, (1, 4)))
    sizes = structure.widths.sizes(1)
    heads = sizes["group"] * sizes["query"] * sizes["value"]
    assert seen == {sites[0][0].path: sizes["channel"], sites[1][0].path: heads}
    for (site,) in sites:
        assert site.line.reads is not None
        assert site.line.reads.size(sizes) == seen[site.path]


def test_widths_come_from_the_config() -> None:
    widths = Structure.of(tiny_model("falcon-7b")).widths
    assert widths.layers[0] == {"channel": 128, "group": 1, "query": 4, "value": 8}
    widths = Structure.of(tiny_model("llama")).widths
    assert widths.layers == [{"channel": 20, "group": 2, "query": 3, "value": 8}] * 3
    assert widths.shared == {"hidden": 36, "vocab": 61, "head_dim": 8}
