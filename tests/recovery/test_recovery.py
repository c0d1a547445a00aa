"""LoRA: attach, merge, save and check, on Linear and on transformers' Conv1D."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.recovery.adapter_files import save_adapter
from lit_prune.recovery.lora import (
    adapter_state,
    attach_lora,
    check_adapter,
    has_lora,
    lora_parameters,
    merge_lora,
)


def cast_to(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    nn.Module.to(model, dtype)  # what transformers puts around `.to` hides its type
    return model.eval()


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=53,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        return cast_to(LlamaForCausalLM(config), dtype)
    config = GPT2Config(vocab_size=53, n_positions=32, n_embd=16, n_layer=3, n_head=2)
    return cast_to(GPT2LMHeadModel(config), dtype)


def linears(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, Conv1D)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [name for name in found if name != "lm_head"]


def attach(model: PreTrainedModel, **changes) -> list[str]:
    targets = changes.pop("targets", linears(model))
    options = {"rank": 4, "alpha": 6.0, "dtype": torch.float32, "seed": 3, **changes}
    attach_lora(model, targets=targets, **options)
    return targets


def train_a_little(model: nn.Module) -> None:
    """Random B (it starts from 0), so that the adapter changes the outputs."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in adapter_state(model).items():
        if ".lora_B" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)


def logits_of(model: nn.Module) -> Tensor:
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def tree(model: nn.Module) -> list[tuple[str, type, bool]]:
    return [(name, type(module), module.training) for name, module in model.named_modules()]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attach_changes_nothing_yet_and_trains_only_the_adapters(family: str):
    model = make_model(family)
    before = logits_of(model)
    targets = attach(model, dtype=torch.bfloat16)

    assert has_lora(model)
    factors = lora_parameters(model)
    assert len(factors) == 2 * len(targets)
    assert {p.dtype for p in factors} == {torch.bfloat16}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in trainable] == [id(p) for p in factors]
    assert all(p.any() for p in factors[::2])
    assert not any(p.any() for p in factors[1::2])
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)


def test_seed_alone_decides_a_and_the_random_state_stays():
    states = []
    for seed, default in ((1, torch.float32), (1, torch.bfloat16), (2, torch.float32)):
        model = make_model("llama")
        torch.manual_seed(len(states))
        state = torch.get_rng_state()
        torch.set_default_dtype(default)  # as in Lightning's module_init_context
        try:
            attach(model, seed=seed)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(torch.get_rng_state(), state)
        states.append(adapter_state(model))
    key = "model.layers.0.mlp.down_proj.lora_A.weight"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0][key], states[2][key])
    assert states[0][key].dtype == torch.float32
    bound = 24**-0.5
    assert 0.8 * bound < states[0][key].abs().max() <= bound


def test_long_lists_of_targets_stay_exactly_those():
    model = make_model("llama")
    targets = [name for name in linears(model) if "layers.1.mlp" not in name]
    targets = attach(model, targets=targets[::-1])
    found = {name.rpartition(".lora_")[0] for name in adapter_state(model)}
    assert found == set(targets)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_merge_is_the_literal_formula_to_the_bit(
    family: str, dtype: torch.dtype, adapter: torch.dtype
):
    model = make_model(family, dtype)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = tree(model)
    keys = list(model.state_dict())
    targets = attach(model, dtype=adapter)
    train_a_little(model)
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    merge_lora(model)

    assert tree(model) == before
    assert list(model.state_dict()) == keys
    assert not has_lora(model)
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())
    for path in targets:
        a, b = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
        update = (6.0 / 4) * (b.float() @ a.float())
        update = update.T if family == "gpt2" else update
        name = f"{path}.weight"
        expected = (weights[name].float() + update).to(dtype)
        assert torch.equal(model.get_parameter(name), expected)
        assert not torch.equal(expected, weights.pop(name))
    assert all(torch.equal(model.get_parameter(name), weights[name]) for name in weights)
    assert "lm_head.weight" not in dict(model.named_parameters())  # still tied


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_gives_the_adapted_logits(family: str):
    model = make_model(family)
    plain = logits_of(model)
    attach(model)
    train_a_little(model)
    adapted = logits_of(model)
    merge_lora(model)
    assert (adapted - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(model), adapted, rtol=1e-5, atol=1e-6)


def test_merge_under_autocast_is_not_in_bfloat16():
    merged = []
    for enabled in (False, True):
        model = make_model("llama")
        attach(model)
        train_a_little(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            merge_lora(model)
        merged.append(model.state_dict())
    assert all(torch.equal(merged[0][key], merged[1][key]) for key in merged[0])


def test_merge_without_lora_does_nothing():
    model = make_model("llama").requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merge_lora(model)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)
    assert not any(p.requires_grad for p in model.parameters())


def test_merge_refuses_a_diverged_adapter_and_changes_nothing():
    model = make_model("llama")
    targets = attach(model)
    train_a_little(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapter_state(model)[f"{targets[-1]}.lora_B.weight"][0, 0] = torch.nan
    before[f"{targets[-1]}.lora_B.default.weight"][0, 0] = torch.nan
    with pytest.raises(UserError, match=targets[-1]):
        merge_lora(model)
    after = model.state_dict()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)


def test_dropout_is_active_only_in_training():
    model = make_model("llama")
    attach(model, dropout=0.5)
    train_a_little(model)
    assert torch.equal(logits_of(model), logits_of(model))
    model.train()
    assert not torch.equal(logits_of(model), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_adapter_loads_in_peft(family: str, tmp_path: Path):
    model = make_model(family)
    attach(model, targets=linears(model)[2:])
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter", base="owner/name")

    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["target_modules"] == sorted(linears(make_model(family))[2:])
    loaded = PeftModel.from_pretrained(make_model(family), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(loaded.eval()), logits_of(model))


def test_save_leaves_an_existing_folder_alone(tmp_path: Path):
    model = make_model("llama")
    with pytest.raises(UserError, match="with LoRA"):
        save_adapter(model, tmp_path / "adapter")
    attach(model)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="new folder"):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(UserError, match="new folder"):
        save_adapter(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = make_model("llama")
    attach(model)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peft.LoraConfig.save_pretrained", full)
    with pytest.raises(UserError, match="enough disk space"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_check_adapter_takes_what_fits(family: str):
    model = make_model(family)
    attach(model)
    state = adapter_state(model)
    check_adapter(model, state)
    check_adapter(make_model(family), state)
    check_adapter(make_model(family), {f"base_model.model.{k}": v for k, v in state.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"model.layers.9.mlp.up_proj.lora_A.weight": t}, "layers.9.mlp.up_proj"),
        (lambda t: {"model.norm.lora_A.weight": t}, "model.norm"),
        (
            lambda t: {"model.layers.1.mlp.down_proj.lora_A.weight": t[:, :20]},
            "24 inputs at model.layers.1.mlp.down_proj, got 20",
        ),
        (
            lambda t: {"model.layers.1.mlp.up_proj.lora_B.weight": torch.zeros(30, 4)},
            "24 outputs at model.layers.1.mlp.up_proj, got 30",
        ),
    ],
)
def test_check_adapter_names_the_first_misfit(change, words: str):
    good = {"model.layers.0.mlp.down_proj.lora_A.weight": torch.zeros(4, 24)}
    state = good | change(torch.zeros(4, 24))
    with pytest.raises(UserError, match=words):
        check_adapter(make_model("llama"), state)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank >= 1"),
        ({"alpha": 0.0}, "alpha > 0"),
        ({"dropout": 1.0}, "dropout < 1"),
        ({"targets": ["model.layers.7.mlp.up_proj"]}, "no such module"),
        ({"targets": ["model.embed_tokens"]}, "got Embedding"),
        ({"targets": []}, "at least one layer"),
        ({"targets": ["lm_head"]}, "shares its weight with the embedding"),
    ],
)
def test_wrong_arguments_are_one_clear_line(changes: dict, words: str):
    model = make_model("llama")
    with pytest.raises(UserError, match=words):
        attach(model, **changes)
    assert not has_lora(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_adapter_is_refused():
    model = make_model("llama")
    attach(model)
    with pytest.raises(UserError, match="without LoRA"):
        attach(model)
