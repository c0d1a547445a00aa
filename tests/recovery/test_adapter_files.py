"""Adapters' folders: written as peft reads them, and read without trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lit_prune.errors import UserError
from lit_prune.recovery.adapter_files import read_adapter, save_adapter
from lit_prune.recovery.lora import adapter_state, attach_lora
from tests.structure.tiny import tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]


def saved(folder: Path, name: str = "llama") -> dict[str, torch.Tensor]:
    """A folder with an adapter of random numbers; returns its weights."""
    model: Any = tiny_model(name)
    attach_lora(model, rank=3, alpha=5.0, targets=TARGETS, dtype=torch.float32, seed=0)
    state = adapter_state(model)
    for value in state.values():
        value.normal_()
    save_adapter(model, folder)
    return {key: value.clone() for key, value in state.items()}


def test_what_is_written_is_read(tmp_path: Path):
    state = saved(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.rank, adapter.alpha) == (3, 5.0)
    assert sorted(adapter.targets) == sorted(TARGETS)
    assert adapter.state.keys() == state.keys()
    assert all(torch.equal(adapter.state[key], value) for key, value in state.items())


def test_an_adapter_of_peft_is_read(tmp_path: Path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model("llama"), config)  # pyright: ignore[reportArgumentType]
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.rank, adapter.alpha) == (4, 8.0)
    assert sorted(adapter.targets) == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]


def change_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


def drop_tensor(folder: Path, part: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(key for key in tensors if part in key)]
    save_file(tensors, folder / WEIGHTS)


def add_tensor(folder: Path, key: str) -> None:
    save_file({**load_file(folder / WEIGHTS), key: torch.zeros(3, 4)}, folder / WEIGHTS)


def pickle_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / CONFIG).unlink(), "expected a peft adapter's folder with adapter_config"),
        (lambda f: (f / CONFIG).write_text("{"), "expected a peft adapter's folder"),
        (lambda f: (f / CONFIG).write_text("[1]"), "expected a peft adapter's folder"),
        (lambda f: change_config(f, r="8"), "expected a peft adapter's folder"),
        (lambda f: change_config(f, use_dora=True), "plain LoRA adapter in .* use_dora True"),
        (lambda f: change_config(f, use_rslora=True), "with use_rslora True"),
        (lambda f: change_config(f, rank_pattern={"q_proj": 2}), "with rank_pattern"),
        (lambda f: change_config(f, modules_to_save=["lm_head"]), "with modules_to_save"),
        (lambda f: change_config(f, peft_type="IA3"), "with peft_type 'IA3'"),
        (lambda f: change_config(f, r=4), "of rank 4, as adapter_config.json says, got 3 at"),
        (pickle_instead, "pickled adapters are not read"),
        (cut_short, "expected whole safetensors"),
        (lambda f: drop_tensor(f, "lora_A"), "pairs of LoRA's A and B"),
        (lambda f: drop_tensor(f, "lora_B"), "pairs of LoRA's A and B"),
        (lambda f: add_tensor(f, "base_model.model.lm_head.weight"), "got lm_head.weight alone"),
    ],
)
def test_what_is_no_plain_adapter_is_one_clear_line(tmp_path: Path, change: Any, words: str):
    saved(tmp_path)
    read_adapter(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        read_adapter(tmp_path)
    assert "\n" not in str(error.value)


def test_nothing_there_is_one_clear_line(tmp_path: Path):
    with pytest.raises(UserError, match="expected a peft adapter's folder"):
        read_adapter(tmp_path / "nothing")
