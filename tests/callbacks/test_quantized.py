"""Recovery with a base, a teacher and an optimizer in 8 or 4 bit, in a Trainer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_prune import PrunableLM, load_pruned
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    GainLossReport,
    LoRARecovery,
    RandomState,
)
from lit_prune.errors import UserError
from lit_prune.fitting.restore import restore
from lit_prune.recovery.lora import adapter_state
from lit_prune.recovery.quantized import QuantizedLinear
from tests.tiny_fit import (
    CutAt,
    Watch,
    assert_same,
    logits,
    make_data,
    make_trainer,
    save_model,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)
QUANTIZED: Any = ["8bit", "4bit"]
PRECISIONS: Any = [("float32", "32-true"), ("bfloat16", "bf16-true"), ("float32", "bf16-mixed")]


def load(source: str, **options: Any) -> PrunableLM:
    return PrunableLM(source, **{"dtype": "float32", "learning_rate": 1e-2, **options})


def layers_of(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]


class Ends(Callback):
    """Keeps the saved weights when training starts and ends, and what the optimizer holds."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.adapters: dict[str, Tensor] = {}
        self.quantized: list[str] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.end = {key: value.clone() for key, value in pl_module.state_dict().items()}
        state = adapter_state(pl_module.model)
        self.adapters = {key: value.clone() for key, value in state.items()}
        self.quantized = [layer.precision for layer in layers_of(pl_module.model)]


# --- the base --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", QUANTIZED)
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_merge_is_onto_the_dense_weights(
    tmp_path: Path, name: str, dtype: Any, precision: Any, base: Any
):
    module, ends = load(save_model(tmp_path / "dense", name), dtype=dtype), Ends()
    lora = LoRARecovery(rank=2, alpha=3.0, base=base)
    callbacks = [CutAt(0), lora, ends, ExportCheckpoint()]
    trainer = make_trainer(tmp_path / "run", callbacks, precision=precision)
    trainer.fit(module, datamodule=make_data(tmp_path))

    assert ends.start.keys() == ends.end.keys()
    for key, value in ends.start.items():
        assert torch.equal(value, ends.end[key]) == ("lora_" not in key), key
    assert ends.quantized == [base] * (len(ends.adapters) // 2)
    assert len(ends.adapters) > 12
    assert layers_of(module.model) == []
    merged = module.state_dict()
    for key, value in ends.end.items():
        if "lora_" in key:
            continue
        path = key.replace(".base_layer", "").removeprefix("model.").removesuffix(".weight")
        if f"{path}.lora_A.weight" in ends.adapters:
            down, up = (ends.adapters[f"{path}.lora_{part}.weight"].float() for part in "AB")
            product = up @ down
            product = product.T if name == "gpt2" else product
            value = (value.float() + 1.5 * product).to(value.dtype)
            assert not torch.equal(value, ends.end[key])
        assert_same(merged[key.replace(".base_layer", "")], value, key)
    assert_same(logits(load_pruned(tmp_path / "run" / "pruned")), logits(module.model))


@pytest.mark.parametrize("base", QUANTIZED)
def test_training_is_nearly_that_on_the_dense_base(tmp_path: Path, base: Any):
    source, runs = save_model(tmp_path / "dense"), {}
    for precision in ("dense", base):
        ends = Ends()
        trainer = make_trainer(tmp_path, [LoRARecovery(rank=4, base=precision), ends], max_steps=40)
        trainer.fit(load(source), datamodule=make_data(tmp_path))
        runs[precision] = ends.losses
    assert runs["dense"] != runs[base]
    close = 0.03 if base == "8bit" else 0.15
    assert runs[base][:10] == pytest.approx(runs["dense"][:10], rel=close)
    assert sum(runs[base][-10:]) < 0.98 * sum(runs[base][:10])


def checkpointed(folder: Path, source: str, resume: str | None = None, **options: Any) -> Any:
    """A fit with everything in few bits and a checkpoint after each step."""
    settings = {"optimizer": "adamw8bit", "schedule": "linear", "weight_decay": 0.1}
    module, watch = load(source, **settings), Watch()
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [RandomState(), CutAt(0), LoRARecovery(rank=256, dropout=0.2, **options)]
    teacher = options["base"]
    callbacks += [Distillation(hidden=0.1, teacher=teacher), ExportCheckpoint(), watch, saver]
    precision: Any = "bf16-true" if options["dtype"] == "bfloat16" else "32-true"
    trainer = make_trainer(
        folder, callbacks, max_steps=4, enable_checkpointing=True, precision=precision
    )
    data = make_data(folder.parent)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return watch, module


@pytest.mark.parametrize("base", QUANTIZED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_fit_ends_like_an_uninterrupted_one(tmp_path: Path, base: Any, dtype: Any):
    source = save_model(tmp_path / "dense")
    whole, module = checkpointed(tmp_path / "whole", source, base=base, dtype=dtype)
    kept = whole.kept["state"]
    kinds = {value["__bnb_optimizer_quant_state__"]["state1"].dtype for value in kept.values()}
    assert kinds == {torch.uint8, torch.float32}  # small ones are not worth it
    for step in (1, 3):
        path = str(tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt")
        again, other = checkpointed(tmp_path / f"from{step}", source, path, base=base, dtype=dtype)
        assert_same(again.end, whole.end, f"weights after {step}")
        assert_same(again.kept, whole.kept, f"optimizer after {step}")
        assert_same(again.logits, whole.logits)
        assert_same(dict(other.model.state_dict()), dict(module.model.state_dict()))


def test_a_checkpoint_holds_the_dense_weights_and_needs_no_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source, keys, states = save_model(tmp_path / "dense"), [], []
    for base in ("dense", "4bit"):
        folder = tmp_path / base
        saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1)
        precision: Any = base
        callbacks = [CutAt(0), LoRARecovery(rank=2, base=precision), saver]
        trainer = make_trainer(folder, callbacks, max_steps=1, enable_checkpointing=True)
        module = load(source)
        trainer.fit(module, datamodule=make_data(tmp_path))
        path = folder / "checkpoints" / "step=1.ckpt"
        content = torch.load(path, weights_only=True)
        keys.append(list(content["state_dict"]))
        states.append({k: v for k, v in content["state_dict"].items() if "lora_" not in k})
        assert content["lit_prune"]["adapter"]["base"] == base
        assert all(value.is_floating_point() for value in states[-1].values() if value.dim() > 1)
        module.finish()
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"model": {"pretrained": source, "optimizer": "adamw8bit"}})
        )
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "bitsandbytes", None)
            restored, steps = restore(folder, print, dtype="float32")
        restored.finish()
        assert steps == 1
        assert_same(dict(restored.model.state_dict()), dict(module.model.state_dict()))
    assert keys[0] == keys[1]
    assert_same(states[0], states[1])


def test_without_bitsandbytes_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = save_model(tmp_path / "dense")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    wanted: list[tuple[dict[str, Any], list[Callback]]] = [
        ({}, [LoRARecovery(base="8bit")]),
        ({}, [LoRARecovery(), Distillation(teacher="4bit")]),
        ({"optimizer": "adamw8bit"}, [LoRARecovery()]),
    ]
    for options, callbacks in wanted:
        module = load(source, **options)
        trainer = make_trainer(tmp_path, [CutAt(0), *callbacks])
        with pytest.raises(UserError, match=r"pip install 'lit-prune\[quant\]'"):
            trainer.fit(module, datamodule=make_data(tmp_path))
        assert module.phase == "dense"


def test_unknown_settings_are_refused(tmp_path: Path):
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": "sgd"}, "adamw, adamw8bit, got 'sgd'"),
        ({"schedule": "step"}, "cosine, linear, constant, got 'step'"),
        ({"warmup": 1.5}, "warmup from 0 to 1"),
    ]
    for options, words in wrong:
        with pytest.raises(UserError, match=words):
            PrunableLM("anything", **options)
    lora: Any = LoRARecovery(base="2bit")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="dense, 8bit or 4bit"):
        make_trainer(tmp_path, [lora]).fit(
            load(save_model(tmp_path / "dense")), make_data(tmp_path)
        )


# --- the teacher -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.parametrize("trainer_precision", ["32-true", "bf16-true"])
def test_the_teacher_is_the_rounded_dense_model(
    tmp_path: Path, precision: Any, trainer_precision: Any
):
    source = save_model(tmp_path / "dense")
    dense: Any = load_pruned(source)
    dense.to(torch.bfloat16 if trainer_precision == "bf16-true" else torch.float32)
    expected = {}
    for name, linear in list(dense.named_modules()):
        if ".layers." in name and isinstance(linear, nn.Linear):
            expected[name] = QuantizedLinear(linear, precision, keep=False)
            linear.weight.data = expected[name].dequantized(linear.weight.dtype)
    seen: list[Any] = []

    class Peek(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append((pl_module.teacher, logits(pl_module.teacher)))

    for part in ("whole", "resumed"):
        folder = tmp_path / part
        saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1)
        callbacks = [CutAt(0), LoRARecovery(rank=2), Distillation(teacher=precision)]
        report = GainLossReport(rounds=1, length=8)
        trainer = make_trainer(
            folder,
            [*callbacks, Peek(), report, saver],
            max_steps=1 if part == "whole" else 2,
            enable_checkpointing=True,
            precision=trainer_precision,
        )
        path = None if part == "whole" else str(tmp_path / "whole/checkpoints/step=1.ckpt")
        module = load(source)
        trainer.fit(module, datamodule=make_data(tmp_path), ckpt_path=path)
        teacher, found = seen[-1]
        layers = {name: part for name, part in teacher.named_modules() if name in expected}
        assert len(layers) == 21
        for name, layer in layers.items():
            assert layer._dense == []
            assert_same(layer._held, expected[name]._held)
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not teacher.training
        close = 1e-5 if trainer_precision == "32-true" else 0.3
        torch.testing.assert_close(found, logits(dense), rtol=close, atol=close)
        # the speed is that of the dense model
        assert layers_of(module.require_teacher()) == []
        assert_same(logits(module.require_teacher(precision)), found)
        assert json.loads((folder / "report.json").read_text())["models"]["dense"]
    assert_same(seen[0][1], seen[1][1])


def test_a_model_in_memory_keeps_what_was_asked_for(tmp_path: Path):
    model: Any = load_pruned(save_model(tmp_path / "dense"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    module = PrunableLM.from_model(model)
    distillation = Distillation(teacher="8bit")
    trainer = make_trainer(tmp_path, [CutAt(0), distillation], max_steps=1)
    trainer.fit(module, make_data(tmp_path, tokenizer=str(tmp_path / "dense")))
    assert len(layers_of(module.require_teacher("8bit"))) == 21
    with pytest.raises(UserError, match="at hand, got a model given in memory"):
        module.require_teacher()
    teacher: Any = module.teacher
    again = teacher.state_dict()
    for name, value in weights.items():  # biases of quantized layers are copies too
        assert name not in again or torch.equal(again[name], value), name
    assert sum("bias" in name for name in again) == sum("bias" in name for name in weights)
