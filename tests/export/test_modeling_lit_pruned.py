from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.export import modeling_lit_pruned as pruned
from tests.export.cutters import cut_alibi_heads, cut_values, ids, logits, tiny

_KEPT = [[0, 2], [1, 2, 3], [3]]


@pytest.mark.parametrize(
    ("name", "attention"),
    [("bloom", None), ("falcon-alibi", "sdpa"), ("falcon-alibi", "eager")],
)
@pytest.mark.parametrize("padded", [False, True])
def test_cut_heads_read_their_own_biases(name: str, attention: str | None, padded: bool) -> None:
    reference, model = tiny(name, attention=attention), tiny(name, attention=attention)
    cut_alibi_heads(reference, _KEPT, mask_only=True)
    cut_alibi_heads(model, _KEPT)
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    with torch.no_grad():
        want = reference(input_ids=ids(), attention_mask=mask).logits[:, 4:]
        got = model(input_ids=ids(), attention_mask=mask).logits[:, 4:]
        unmasked = model(input_ids=ids()).logits[:, 4:]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.allclose(unmasked, got, atol=1e-5) != padded


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi"])
def test_cut_heads_generate_with_a_cache_as_without(name: str) -> None:
    model = tiny(name)
    cut_alibi_heads(model, _KEPT)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    tokens = ids(5)
    with_cache = model.generate(tokens, **options)
    for _ in range(8):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(with_cache, tokens)


def test_a_second_choice_of_heads_is_composed() -> None:
    module = nn.Module()
    pruned.keep_heads(module, [0, 2, 3], 4)
    pruned.keep_heads(module, [1, 2], 4)
    assert getattr(module, "lit_prune_heads") == [2, 3]  # noqa: B009
    assert len(module._forward_pre_hooks) == 1


def test_select_heads_against_a_literal_choice() -> None:
    module = nn.Module()
    pruned.keep_heads(module, [1, 3], 4)
    flat, mask = torch.randn(2 * 4, 1, 5), torch.randn(2, 4, 3, 5)
    _, got = pruned.select_heads(module, (), {"alibi": flat, "attention_mask": mask, "x": 1})
    assert torch.equal(got["alibi"], torch.stack([flat[1], flat[3], flat[5], flat[7]]))
    assert torch.equal(got["attention_mask"], mask[:, [1, 3]])
    common = torch.randn(2, 1, 3, 5)
    given = {"alibi": flat.view(2, 4, 1, 5), "attention_mask": common}
    _, got = pruned.select_heads(module, (), given)
    assert torch.equal(got["alibi"].reshape(4, 1, 5), flat[[1, 3, 5, 7]])
    assert got["attention_mask"] is common
    _, got = pruned.select_heads(module, (), {"alibi": None, "attention_mask": None})
    assert got == {"alibi": None, "attention_mask": None}


_FEATURES = [[0, 2, 3], [1, 5], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_narrow_values_run_in_the_stock_attention(name: str, attention: str) -> None:
    reference, model = tiny(name, attention=attention), tiny(name, attention=attention)
    dense = logits(reference)
    cut_values(reference, _FEATURES, mask_only=True)
    cut_values(model, _FEATURES)
    want, got = logits(reference), logits(model)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert (got - dense).abs().max() > 0.05 * dense.abs().max()
    assert torch.equal(logits(copy.deepcopy(model)), got)


def test_values_are_padded_and_taken_head_by_head() -> None:
    record = {"writer": "v", "reader": "o", "before": 2, "value": 2, "head_dim": 3}
    written = torch.arange(1.0, 9).view(1, 1, 8)  # two other features, then three heads of two
    padded = pruned.PadValues(record)(nn.Identity(), (), written)
    assert padded.tolist() == [[[1, 2, 3, 4, 0, 5, 6, 0, 7, 8, 0]]]
    (taken, other) = pruned.TakeValues(record)(nn.Identity(), (padded[..., 2:], "other"))
    assert taken.tolist() == [[[3, 4, 5, 6, 7, 8]]]
    assert other == "other"
    alone = pruned.PadValues(record | {"before": 0})(nn.Identity(), (), written[..., 2:])
    assert torch.equal(alone, padded[..., 2:])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(4, 4, bias=False), nn.Linear(4, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.v(x)
        assert wide.shape[-1] == 6
        return self.o(wide)


def _hooks(module: nn.Module) -> dict[str, int]:
    found = {
        name: len(part._forward_hooks) + len(part._forward_pre_hooks)
        for name, part in module.named_modules()
    }
    return {name: count for name, count in found.items() if count}


def test_hooks_follow_wrappers_and_come_back() -> None:
    class Wrapper(nn.Module):
        """Like LoRA: adds to what a layer makes of its input."""

        def __init__(self, base_layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.update = nn.Linear(base_layer.in_features, base_layer.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.update(x)

    module, x = _Attention(), torch.randn(2, 4)
    options: dict[str, Any] = {"writer": "v", "reader": "o", "before": 0, "head_dim": 3}
    pruned.narrow_values(module, value=1, **options)
    pruned.narrow_values(module, value=2, **options)  # replaces the first
    assert _hooks(module) == {"": 1, "v": 1, "o": 1}
    plain, base = module(x), (module.v, module.o)
    assert torch.allclose(plain, x @ base[0].weight.T @ base[1].weight.T, atol=1e-6)
    module.v, module.o = Wrapper(base[0]), Wrapper(base[1])  # pyright: ignore[reportAttributeAccessIssue]
    wrapped = module(x)
    assert _hooks(module) == {"": 1, "v": 1, "o": 1}
    inner = base[0].forward(x) + module.v.update(x)  # pyright: ignore[reportCallIssue]
    assert torch.allclose(wrapped, base[1].forward(inner) + module.o.update(inner), atol=1e-6)  # pyright: ignore[reportCallIssue]
    module.v, module.o = base
    assert torch.equal(module(x), plain)
    assert _hooks(module) == {"": 1, "v": 1, "o": 1}
    twin = copy.deepcopy(module)
    twin.v = nn.Linear(4, 4, bias=False)
    twin(x)
    assert _hooks(twin) == _hooks(module) == {"": 1, "v": 1, "o": 1}
    assert module.v._forward_hooks.keys() != twin.v._forward_hooks.keys()


def test_other_hooks_see_what_the_reader_gets() -> None:
    module, seen = _Attention(), []
    module.o.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    pruned.narrow_values(module, writer="v", reader="o", before=0, value=2, head_dim=3)
    module(torch.randn(2, 4))
    assert seen == [4]


def _record(**entries: Any) -> dict[str, Any]:
    return {"version": pruned.FORMAT, "shapes": {}, "attributes": {}} | entries


def test_resize_makes_drops_and_cuts_parameters() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3))
    shapes = {"0.weight": [2, 4], "0.bias": [2], "1.weight": [2], "1.bias": None}
    attributes = {"1": {"normalized_shape": [2], "eps": 0.5, "_private": 1}}
    first = model[0].weight[:2].clone()
    pruned.resize(model, _record(shapes=shapes, attributes=attributes))
    assert torch.equal(model[0].weight, first)
    assert model[0].bias.shape == (2,)
    assert model[1].bias is None
    assert model[1].normalized_shape == (2,)
    assert model[1].eps == 0.5
    assert not hasattr(model[1], "_private")


@pytest.mark.parametrize(
    "record",
    [_record(version=2), _record(shapes={"weight": [5, 4]}), _record(shapes={"weight": [3]})],
)
def test_resize_refuses_what_it_cannot_read(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        pruned.resize(nn.Linear(4, 3), record)


def test_the_file_imports_torch_and_transformers_only() -> None:
    text = pruned.written_source(LlamaConfig, LlamaForCausalLM)
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    allowed = {"__future__", "copy", "functools", "pathlib", "typing", "torch", "transformers"}
    assert names == allowed


def test_a_written_file_writes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = pruned.written_source(LlamaConfig, LlamaForCausalLM)
    copy = tmp_path / "copy.py"
    copy.write_text(text)
    monkeypatch.setattr(pruned, "__file__", str(copy))
    assert pruned.written_source(LlamaConfig, LlamaForCausalLM) == text


def test_a_model_made_from_the_config_alone_is_initialised() -> None:
    config_class, model_class = pruned.pruned_classes(LlamaConfig, LlamaForCausalLM)
    dense = tiny("llama-tied").config
    config = config_class.from_dict(dense.to_dict())
    config.lit_prune = _record(shapes={"model.norm.weight": [20]})
    model = model_class(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.norm.weight, torch.ones(20))
    assert 0 < model.lm_head.weight.std() < 0.1


def test_layers_with_their_own_config_follow_the_attention_implementation() -> None:
    config_class, model_class = pruned.pruned_classes(LlamaConfig, LlamaForCausalLM)
    config = config_class.from_dict(tiny("llama").config.to_dict())
    config.lit_prune = _record(
        attributes={"model.layers.1.self_attn": {"config": {"intermediate_size": 3}}}
    )
    model = model_class(config)
    model.set_attn_implementation("eager")
    own = model.model.layers[1].self_attn.config
    assert (own._attn_implementation, own.intermediate_size) == ("eager", 3)
    assert model.config.intermediate_size == 20
