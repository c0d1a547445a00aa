from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lit_prune.errors import UserError
from lit_prune.export import as_stock, differences, export_checkpoint, load_pruned
from lit_prune.export.load import load_pruned_config
from tests.export.cutters import CASES, cut_case, ids, logits, with_width


def _export(case: str, out: Path, dtype: torch.dtype = torch.float32):
    model, config = cut_case(case, dtype)
    export_checkpoint(model, None, out, config=config, layout={}, lineage=[], card="")
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_to_the_bit_and_again(
    case: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = _export(case, tmp_path / "o", dtype)
    loaded = load_pruned(tmp_path / "o")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    if not CASES[case]:
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load_pruned(tmp_path / "again")), logits(model))
        config = (tmp_path / "again" / "config.json").read_text()
        assert config == (tmp_path / "o" / "config.json").read_text()


def test_the_folders_code_is_never_run(tmp_path: Path) -> None:
    model = _export("llama/widths", tmp_path / "o")
    (tmp_path / "o" / "modeling_lit_pruned.py").write_text("raise SystemExit")
    assert torch.equal(logits(load_pruned(tmp_path / "o")), logits(model))


def test_dtype_and_attention_can_be_chosen(tmp_path: Path) -> None:
    _export("llama/widths", tmp_path / "o")
    model = load_pruned(tmp_path / "o", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_reloaded_model_trains_with_gradients_everywhere(tmp_path: Path) -> None:
    _export("llama-tied/widths-layer", tmp_path / "o")
    model = load_pruned(tmp_path / "o").train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("case", [case for case, stock in CASES.items() if not stock])
def test_as_stock_is_what_was_in_memory(case: str, tmp_path: Path) -> None:
    model = _export(case, tmp_path / "o")
    loaded = as_stock(load_pruned(tmp_path / "o"))
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(model.config)
    assert loaded.config.model_type == model.config.model_type
    assert torch.equal(logits(loaded), logits(model))
    assert differences(loaded, model.config) == differences(model, model.config)
    assert not export_checkpoint(
        loaded, None, tmp_path / "p", config=None, layout={}, lineage=[], card=""
    )
    files = [(tmp_path / name / "config.json").read_text() for name in ("o", "p")]
    assert files[0] == files[1]


def test_a_cut_of_a_cut(tmp_path: Path) -> None:
    _export("bloom/heads", tmp_path / "o")
    model = as_stock(load_pruned(tmp_path / "o"))
    del model.transformer.h[0]
    for layer, block in enumerate(model.transformer.h):
        block.self_attention.layer_idx = layer
    model.config.num_hidden_layers = 2
    export_checkpoint(model, None, tmp_path / "p", config=None, layout={}, lineage=[], card="")
    assert torch.equal(logits(load_pruned(tmp_path / "p")), logits(model))


def test_a_reloaded_model_can_be_exported_without_as_stock(tmp_path: Path) -> None:
    _export("llama/widths", tmp_path / "o")
    model = load_pruned(tmp_path / "o")
    proposed = with_width(model.config, intermediate_size=7)
    assert differences(model, proposed)
    export_checkpoint(model, None, tmp_path / "p", config=proposed, layout={}, lineage=[], card="")
    assert torch.equal(logits(load_pruned(tmp_path / "p")), logits(model))


def test_the_config_alone(tmp_path: Path) -> None:
    _export("llama/widths", tmp_path / "o")
    _export("llama/equal", tmp_path / "s")
    assert load_pruned_config(tmp_path / "o").lit_prune["base_model_type"] == "llama"
    assert type(load_pruned_config(tmp_path / "s")) is LlamaForCausalLM.config_class


def _rewrite(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_pruned(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        load_pruned(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(UserError, match="'mine'"):
        load_pruned(tmp_path)
    _export("llama/widths", tmp_path / "o")
    _rewrite(tmp_path / "o", lit_prune={"version": 99, "base_model_type": "llama"})
    with pytest.raises(UserError, match="format"):
        load_pruned(tmp_path / "o")


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    _export("llama/widths", tmp_path / "o")
    path = tmp_path / "o" / "model.safetensors"
    weights = load_file(path)
    last = weights.pop("model.norm.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        load_pruned(tmp_path / "o")
    save_file({**weights, "model.norm.weight": last[:5].clone()}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="sizes"):
        load_pruned(tmp_path / "o")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="whole safetensors"):
        load_pruned(tmp_path / "o")
