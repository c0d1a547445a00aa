"""LoRARecovery and Distillation in a Trainer, with the report and the export behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from lit_prune import PrunableLM, load_pruned
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomState,
)
from lit_prune.errors import UserError
from lit_prune.recovery.lora import adapter_state, has_lora
from tests.tiny_fit import (
    Watch,
    assert_same,
    logits,
    make_data,
    make_trainer,
    parameters,
    save_model,
)


def fasp(**options: Any) -> FASPPruning:
    return FASPPruning(**{"samples": 8, "length": 16, **options})


def load(source: str, **options: Any) -> PrunableLM:
    return PrunableLM(source, **{"dtype": "float32", "learning_rate": 1e-2, **options})


class Adapters(Callback):
    """Keeps the base weights and the adapters as they are when training ends."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.state: dict[str, Tensor] = {}
        self.trained: set[str] = set()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        named = pl_module.model.named_parameters()
        self.trained = {name for name, value in named if value.requires_grad}
        self.weights = parameters(pl_module.model)
        state = adapter_state(pl_module.model)
        self.state = {name: value.clone() for name, value in state.items()}


DTYPES = [("float32", "32-true"), ("bfloat16", "bf16-true")]


# --- LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "32-true"), ("bfloat16", "bf16-true")]
)
def test_only_adapters_train_and_the_result_is_the_weights_plus_their_product(
    tmp_path: Path, name: str, dtype: Any, precision: Any
):
    module = load(save_model(tmp_path / "dense", name), dtype=dtype)
    kept, watch = Adapters(), Watch()
    callbacks = [fasp(), LoRARecovery(rank=2, alpha=3.0), watch, kept, ExportCheckpoint()]
    trainer = make_trainer(tmp_path / "run", callbacks, max_steps=3, precision=precision)
    trainer.fit(module, datamodule=make_data(tmp_path))
    trained = {f"model.{key}" for key in kept.trained}
    assert {key for key in watch.start if "lora_" in key} == trained
    for key, value in watch.start.items():
        assert torch.equal(value, watch.end[key]) == ("lora_" not in key), key
    assert {value.dtype for value in kept.state.values()} == {module.model.dtype}

    assert not has_lora(module.model)
    assert not any("lora" in type(part).__module__ for part in module.modules())
    merged = dict(module.model.named_parameters())
    for key, value in kept.weights.items():
        if "lora_" in key:
            continue
        path = key.replace(".base_layer", "").removesuffix(".weight")
        final = merged[key.replace(".base_layer", "")]
        if f"{path}.lora_A.weight" in kept.state:
            product = kept.state[f"{path}.lora_B.weight"].float() @ (
                kept.state[f"{path}.lora_A.weight"].float()
            )
            product = product.T if name == "gpt2" else product
            value = (value.float() + 1.5 * product).to(value.dtype)
        assert_same(final.detach(), value, key)
    assert len(kept.state) == 2 * sum("layer" in k or "h." in k for k in _linears(module.model))
    assert_same(logits(load_pruned(tmp_path / "run" / "pruned")), logits(module.model))


def _linears(model: nn.Module) -> list[str]:
    kinds = {"Linear", "Conv1D"}
    found = [name for name, part in model.named_modules() if type(part).__name__ in kinds]
    return [name for name in found if name != "lm_head"]


def test_targets_and_dtype_can_be_chosen(tmp_path: Path):
    module, kept = load(save_model(tmp_path / "dense"), dtype="bfloat16"), Adapters()
    lora = LoRARecovery(rank=2, targets=["q_proj", "down_proj"], dtype="float32")
    make_trainer(tmp_path, [lora, kept]).fit(module, datamodule=make_data(tmp_path))
    assert {path.split(".")[-3] for path in kept.state} == {"q_proj", "down_proj"}
    assert {value.dtype for value in kept.state.values()} == {torch.float32}
    for targets in (["query"], ["q_proj", "query"]):
        wrong = LoRARecovery(targets=targets)
        words = "expected LoRA targets out of down_proj, gate_proj.* got query; choose"
        with pytest.raises(UserError, match=words):
            make_trainer(tmp_path, [wrong]).fit(load(module.pretrained), make_data(tmp_path))


def test_an_unknown_dtype_is_refused_before_the_cut(tmp_path: Path):
    module, wrong = load(save_model(tmp_path / "dense")), LoRARecovery(dtype=cast(Any, "flaot32"))
    with pytest.raises(UserError, match=r"adapters' dtype out of auto, float32, .* got 'flaot32'"):
        make_trainer(tmp_path, [fasp(), wrong]).fit(module, make_data(tmp_path))
    assert module.phase == "dense"


def test_the_control_without_pruning_trains_and_reports(tmp_path: Path):
    module = load(save_model(tmp_path / "dense"))
    before = load(module.pretrained)
    before.configure_model()
    callbacks = [LoRARecovery(rank=2), Distillation(), GainLossReport(rounds=1, length=8)]
    trainer = make_trainer(tmp_path / "run", [*callbacks, ExportCheckpoint()])
    trainer.fit(module, datamodule=make_data(tmp_path))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["models"].keys() == {"dense", "recovered"}
    assert report["models"]["dense"]["parameters"] == report["models"]["recovered"]["parameters"]
    assert report["models"]["dense"]["perplexity"] != report["models"]["recovered"]["perplexity"]
    assert report["sparsity"] == {"target": 0.0, "decoder": 0.0, "total": 0.0}
    assert "recover" in report["seconds"]
    assert module.is_stock
    change = logits(load_pruned(tmp_path / "run" / "pruned")) - logits(before.model)
    assert change.abs().max() > 1e-3


def test_without_steps_the_cut_model_is_the_result(tmp_path: Path):
    module, watch = load(save_model(tmp_path / "dense"), stock=True), Watch()
    callbacks = [RandomState(), fasp(), LoRARecovery(), Distillation()]
    callbacks += [GainLossReport(rounds=1, length=8), ExportCheckpoint(), watch]
    trainer = make_trainer(tmp_path / "run", callbacks, max_steps=0)
    trainer.fit(module, datamodule=make_data(tmp_path))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["models"].keys() == {"dense", "pruned"}
    assert all(entry["tokens_per_second"] > 0 for entry in report["models"].values())
    assert report["seconds"].keys() == {"calibrate_and_prune"}
    assert module.adapter is None
    card = (tmp_path / "run" / "pruned" / "README.md").read_text()
    assert "recovered | not run" in card
    assert "Recovery" not in card
    assert_same(logits(load_pruned(tmp_path / "run" / "pruned")), watch.logits)


def test_training_without_an_adapter_is_reported_as_recovery(tmp_path: Path):
    for number, pruning in enumerate(([], [fasp()])):
        module, report = load(save_model(tmp_path / "dense")), GainLossReport(rounds=0)
        trainer = make_trainer(tmp_path / "run", [*pruning, report])
        data = make_data(tmp_path)
        trainer.fit(module, datamodule=data)
        names = ["dense", "pruned", "recovered"] if pruning else ["dense", "recovered"]
        assert sorted(report.models) == names, number
        dense, judge = load(module.pretrained), make_trainer(tmp_path, limit_val_batches=None)
        for name, measured in (("dense", dense), ("recovered", module)):
            value = judge.validate(measured, datamodule=data, verbose=False)[0]["val/perplexity"]
            assert report.models[name]["perplexity"] == pytest.approx(value, rel=1e-5)


# --- distillation ----------------------------------------------------------------------------


def reference(student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> dict[str, Tensor]:
    """The three losses, token by token."""
    losses: dict[str, list[Tensor]] = {"task": [], "kl": [], "mse": []}
    for row in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            target = labels[row, place + 1]
            if target == -100:
                continue
            s, r = student[row, place], teacher[row, place]
            losses["task"].append(F.cross_entropy(s, target))
            p = (r / t).softmax(0)
            losses["kl"].append(t * t * (p * (p.log() - (s / t).log_softmax(0))).sum())
            losses["mse"].append((s - r).square().mean())
    return {name: torch.stack(values).mean() for name, values in losses.items()}


class Check(Callback):
    """Compares each step's loss with the reference."""

    def __init__(self, weights: dict[str, float], temperature: float) -> None:
        self.weights, self.temperature = weights, temperature
        self.parts: list[dict[str, Tensor]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        with torch.no_grad():
            student = pl_module.model(input_ids=batch["input_ids"]).logits
            teacher = pl_module.teacher(input_ids=batch["input_ids"]).logits
        self.parts.append(reference(student, teacher, batch["labels"], self.temperature))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        expected = sum(weight * self.parts[-1][name] for name, weight in self.weights.items())
        assert float(outputs["loss"]) == pytest.approx(float(expected), rel=1e-4)
        for name, weight in self.weights.items():
            if weight:
                logged = trainer.logged_metrics[f"train/{name}"]
                assert float(logged) == pytest.approx(float(self.parts[-1][name]), rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "temperature"),
    [({"task": 1.0, "kl": 1.0}, 1.0), ({"task": 0.5, "kl": 2.0, "mse": 0.3}, 2.0)],
)
def test_the_loss_is_the_literal_one(tmp_path: Path, weights: Any, temperature: float):
    module, check = load(save_model(tmp_path / "dense")), Check(weights, temperature)
    distillation = Distillation(**weights, temperature=temperature)
    callbacks = [fasp(), LoRARecovery(rank=2), distillation, check]
    trainer = make_trainer(tmp_path, callbacks, log_every_n_steps=1)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert len(check.parts) == 3
    assert all(float(parts["kl"]) > 1e-3 for parts in check.parts)
    assert module.loss_term is None


def test_the_teacher_teaches_itself_nothing(tmp_path: Path):
    module, watch = load(save_model(tmp_path / "dense")), Watch()
    callbacks = [LoRARecovery(rank=2), Distillation(task=0.0), watch]
    trainer = make_trainer(tmp_path, callbacks, log_every_n_steps=1)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert float(trainer.logged_metrics["train/kl"]) == pytest.approx(0, abs=1e-6)
    assert float(trainer.logged_metrics["train/recovery_loss"]) == pytest.approx(0, abs=1e-6)
