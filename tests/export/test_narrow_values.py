"""Values narrower than keys, from the cut through LoRA and its merge to a checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lit_prune.export import export_checkpoint, load_pruned
from lit_prune.recovery.lora import attach_lora, has_lora, merge_lora, quantize_base
from lit_prune.structure import Layout, Structure, cut, settle
from tests.export.cutters import ids, logits
from tests.structure.layouts import varied
from tests.structure.tiny import tiny_model

#: Family -> modules that write and read values, in a layer.
NAMES = {
    "llama": ("self_attn.v_proj", "self_attn.o_proj"),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
    "opt": ("self_attn.v_proj", "self_attn.out_proj"),
}


def cut_model(name: str) -> tuple[Any, Structure, Layout]:
    model = tiny_model(name)
    structure = Structure.of(model)
    axes = ["value", "group", "channel"] + ["query"] * (name in ("llama", "phi3"))
    layout = varied(structure, axes)
    cut(model, structure, layout)
    settle(model, structure, layout)
    return model, structure, layout


def write(model: Any, layout: Layout, out: Path) -> Path:
    stock = export_checkpoint(
        model, None, out, config=model.config, layout=layout.to_dict(), lineage=[], card=""
    )
    assert not stock
    return out


def train(model: Any, steps: int = 2) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(steps):
        model(input_ids=ids(), labels=ids()).loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_lora_is_trained_merged_exported_and_reloaded(
    tmp_path: Path, name: str, checkpointing: bool
) -> None:
    model, structure, layout = cut_model(name)
    before = logits(model)
    targets = [f"{structure.layers_path}.{i}.{part}" for i in range(3) for part in NAMES[name]]
    options: dict[str, Any] = {"dtype": torch.float32, "seed": 0, "targets": targets}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    attach_lora(model, rank=2, alpha=4.0, **options)
    assert torch.equal(logits(model.eval()), before)
    model.train(checkpointing)
    train(model)
    model.eval()
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-2)
    merge_lora(model)
    assert not has_lora(model)
    merged = logits(model)
    assert torch.allclose(merged, trained, atol=1e-4)
    read = load_pruned(write(model, layout, tmp_path / "out"))
    assert torch.equal(logits(read), merged)
    again = Structure.of(read)
    assert again.widths == structure.widths
    second = varied(again, ["value"], seed=3)
    for which, its in ((model, structure), (read, again)):
        cut(which, its, second)
    assert torch.equal(logits(read), logits(model))


def test_peft_adapts_a_checkpoint_and_takes_its_adapter_off(tmp_path: Path) -> None:
    model, _, layout = cut_model("llama")
    read = load_pruned(write(model, layout, tmp_path / "out"))
    plain = logits(read)
    config = peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(read, config)
    seen = logits(adapted)
    assert not torch.allclose(seen, plain, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)
    adapted.save_pretrained(tmp_path / "adapter")
    other = load_pruned(tmp_path / "out")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(other, tmp_path / "adapter")), seen)
    merged = adapted.merge_and_unload()
    assert torch.allclose(logits(merged), seen, atol=1e-4)


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_lora_over_quantized_layers_is_merged_into_the_dense_ones(precision: Any) -> None:
    pytest.importorskip("bitsandbytes")
    model, structure, _ = cut_model("llama")
    twin = cut_model("llama")[0]
    targets = [f"{structure.layers_path}.{i}.{part}" for i in range(3) for part in NAMES["llama"]]
    attach_lora(model, rank=2, alpha=4.0, targets=targets, dtype=torch.float32, seed=0)
    quantize_base(model, precision)
    train(model)
    merge_lora(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(twin))
    hooked = [part for part in model.modules() if part._forward_hooks]
    assert len(hooked) == 3


def test_generation_after_lora(tmp_path: Path) -> None:
    model, structure, _ = cut_model("llama")
    targets = [f"{structure.layers_path}.{i}.{part}" for i in range(3) for part in NAMES["llama"]]
    attach_lora(model, rank=2, alpha=4.0, targets=targets, dtype=torch.float32, seed=0)
    train(model)
    made = model.generate(ids(5), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(logits(model, made)[:, 4:-1].argmax(-1), made[:, 5:])
