from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lit_prune.export.trial import compare, differences, stock_config, stock_trial
from tests.export.cutters import (
    CONFIGS,
    cut_alibi_heads,
    cut_channels,
    cut_phi3_groups,
    drop_layer,
    tiny,
    with_width,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_uncut_model_is_stock(name: str) -> None:
    model = tiny(name)
    assert differences(model, model.config) == []


def test_a_used_model_is_stock() -> None:
    model = tiny("gemma3")
    model.train()
    model.gradient_checkpointing_enable()
    tokens = torch.randint(3, 61, (2, 30))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert differences(model, model.config) == []


def test_equal_widths_are_stock_with_that_width_only() -> None:
    model = tiny("llama")
    cut_channels(model, [7, 7, 7])
    assert differences(model, with_width(model.config, intermediate_size=7)) == []
    assert len(differences(model, with_width(model.config, intermediate_size=8))) == 3 * (5 + 4)


def test_different_widths_are_not_stock() -> None:
    model = tiny("llama")
    cut_channels(model, [7, 9, 7])
    found = differences(model, with_width(model.config, intermediate_size=7))
    assert found
    assert all("layers.1.mlp" in line for line in found)


def test_a_dropped_layer_is_stock() -> None:
    model = tiny("gemma3")
    drop_layer(model, 1)
    assert differences(model, model.config) == []


def test_a_dropped_layer_needs_its_number_and_its_lists() -> None:
    model = tiny("gemma3")
    dense = stock_config(model.config)
    drop_layer(model, 1)
    assert differences(model, dense)
    model.model.layers[1].self_attn.layer_idx = 2
    assert any("layer_idx = 2" in line for line in differences(model, model.config))


def test_a_remembered_size_counts() -> None:
    model = tiny("llama")
    model.model.norm.variance_epsilon = 2e-6
    assert differences(model, model.config) == ["model.norm: variance_epsilon = 2e-06"]
    assert differences(model, with_width(model.config, rms_norm_eps=2e-6))


def test_an_own_config_counts_where_it_differs() -> None:
    model = tiny("phi3")
    for layer in model.model.layers:
        layer.self_attn.config = stock_config(model.config)
    assert differences(model, model.config) == []
    cut_phi3_groups(model, [2, 1, 2])
    found = "\n".join(differences(model, model.config))
    assert "config = {'num_attention_heads': 2, 'num_key_value_heads': 1}" in found


def test_kept_alibi_heads_count_unless_they_are_all() -> None:
    model = tiny("bloom")
    cut_alibi_heads(model, [[0, 1, 2, 3]] * 3)
    assert differences(model, model.config) == []
    model = tiny("bloom")
    cut_alibi_heads(model, [[0, 1, 2, 3], [1, 2], [0, 1, 2, 3]])
    found = differences(model, model.config)
    assert "transformer.h.1.self_attention: lit_prune_heads = [1, 2]" in found


def test_ties_count() -> None:
    model = tiny("llama-tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert "tied" in differences(model, model.config)[0]
    assert differences(model, with_width(model.config, tie_word_embeddings=False)) == []


def test_a_bias_that_the_config_does_not_have_counts() -> None:
    model = tiny("llama-tied")
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(24))
    assert differences(model, model.config) == ["model.layers.0.mlp.down_proj.bias: shape [24]"]


def test_a_refused_config_is_a_difference() -> None:
    model = tiny("llama")
    (found,) = differences(model, with_width(model.config, num_attention_heads=5))
    assert "refuses" in found


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_what_says_nothing_of_the_model_is_no_difference(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model = tiny("llama")

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(model.config), "save_pretrained", fails)
    with pytest.raises(type(error)):
        differences(model, model.config)


def test_wrapped_modules_and_other_classes_are_differences() -> None:
    class Wrapped(nn.Linear):
        pass

    model: Any = tiny("llama")
    model.lm_head = Wrapped(24, 61, bias=False)
    assert differences(model, model.config) == ["lm_head: Wrapped instead of Linear"]
    model.extra = nn.Linear(2, 2)
    assert differences(model, model.config) == ["modules differ: extra"]


def test_a_buffer_that_the_config_does_not_give_cannot_be_mended() -> None:
    model = tiny("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]
    assert compare(model, stock_trial(model, model.config)).other == [
        "model.rotary_emb.inv_freq: [2] instead of [3]"
    ]


def test_stock_config_leaves_nothing_of_exports_and_quantizers() -> None:
    config = with_width(CONFIGS["llama"], quantization_config={"a": 1}, lit_prune={"b": 2})
    config._name_or_path = "/somewhere"
    plain = stock_config(config)
    assert not {"quantization_config", "lit_prune", "auto_map"} & set(plain.to_dict())
    assert plain._name_or_path == ""
    assert config.lit_prune == {"b": 2}
