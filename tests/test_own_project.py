"""The callbacks in a project with a module, a model wrapper, data and an optimizer of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_prune import callbacks
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    GainLossReport,
    LoRARecovery,
    RandomState,
    VIBPruning,
    WandaPruning,
)
from lit_prune.errors import UserError
from tests.own_project import OwnData, OwnModule, smoothed
from tests.tiny_fit import Watch, assert_same, logits, make_trainer, parameters, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:expected learning rates that sum"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
SMALL: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2}
CUT, STEPS = 2, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("dense"))


class Optimizers(Callback):
    """Notes class and rate of the optimizer in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append((type(optimizer).__name__, optimizer.param_groups[0]["lr"]))


def pruning(kind: str) -> Any:
    if kind == "wanda":
        return WandaPruning(0.3, ["group", "channel"], start=CUT, **SMALL)
    return VIBPruning(0.4, steps=CUT, multiple=8, rate=0.5, **SMALL)


def fit(folder: Path, source: str, used: list[Any], resume: str | None = None) -> OwnModule:
    """Fit with a checkpoint after each step."""
    module = OwnModule(source)
    saver = ModelCheckpoint(folder / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(folder, [*used, RandomState(), saver], STEPS, enable_checkpointing=True)
    torch.manual_seed(0)
    trainer.fit(module, datamodule=OwnData(), ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("kind", ["wanda", "vib"])
def test_it_is_cut_recovered_exported_and_resumed(tmp_path: Path, source: str, kind: str) -> None:
    ends: list[Any] = []
    rates: list[tuple[str, float]] = []
    for step in (0, 1, CUT, 4):
        folder, watch, seen = tmp_path / f"from {step}", Watch(), Optimizers()
        used = [pruning(kind), LoRARecovery(rank=2, dropout=0.1), Distillation()]
        used += [GainLossReport(rounds=0), ExportCheckpoint(), watch, seen]
        resume = str(tmp_path / "from 0" / "steps" / f"step={step}.ckpt") if step else None
        module = fit(folder, source, used, resume)
        kept = torch.load(folder / "steps" / f"step={STEPS}.ckpt", weights_only=True)
        state = [kept[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")]
        report = json.loads((folder / "report.json").read_text())["models"]
        assert list(report) == ["dense", "pruned", "recovered"]
        pruned = {path.name: path.read_bytes() for path in (folder / "pruned").iterdir()}
        ends.append([state, watch.end, pruned, report, module.layout.to_dict()])
        assert_same(ends[0], ends[-1])

        rates = rates or seen.seen
        assert seen.seen == rates[step:]
        # the same logits in plain transformers, and the weights once in a checkpoint
        exported = AutoModelForCausalLM.from_pretrained(folder / "pruned", trust_remote_code=True)
        assert_same(logits(exported), watch.logits)
        assert all(name.startswith("net.") for name in kept["state_dict"])
    assert module.phase == "done"
    # its own optimizer and schedule, anew after the cut, but for the time when masks train
    own = [("SGD", 0.1 * 0.5**step) for step in range(STEPS - CUT)]
    assert rates[CUT:] == own
    assert rates[:CUT] == (own[:CUT] if kind == "wanda" else [("AdamW", 0.5), ("AdamW", 0.25)])
    before = AutoModelForCausalLM.from_pretrained(source)
    assert sum(map(torch.numel, module.model.parameters())) < before.num_parameters()
    assert [entry["method"] for entry in module.history] == [pruning(kind).method]
    assert module.net.lm is module.model
    assert module.net.temperature.item() != 1.5


def test_a_checkpoint_loads_without_a_trainer(tmp_path: Path, source: str) -> None:
    whole = fit(tmp_path, source, [pruning("wanda"), LoRARecovery(rank=2)])
    path = tmp_path / "steps" / f"step={STEPS}.ckpt"
    module = OwnModule.load_from_checkpoint(path, source=source)
    assert module.phase == "recovery"
    assert_same(parameters(module), parameters(whole))
    assert_same(module.layout.to_dict(), whole.layout.to_dict())


# --- what a module must do -------------------------------------------------------------------


class Plain(LightningModule):
    """Knows nothing of this package."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(source)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        raise AssertionError("training began")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", [name for name in callbacks.__all__ if name != "RandomState"])
def test_a_module_of_another_kind_is_refused(tmp_path: Path, source: str, name: str) -> None:
    module = Plain(source)
    before = parameters(module)
    trainer = make_trainer(tmp_path, [getattr(callbacks, name)()])
    with pytest.raises(UserError) as caught:
        trainer.fit(module, datamodule=OwnData())
    assert str(caught.value) == (
        f"expected a lit_prune.Prunable module for {name}, got Plain; make it a class "
        "Plain(Prunable, LightningModule) that calls self.adopt(model)"
    )
    assert_same(before, parameters(module))


class Deaf(OwnModule):
    """Trains on its own loss, whatever callbacks want."""

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return smoothed(self.net(batch).logits, batch["labels"])


@pytest.mark.parametrize("kind", ["distillation", "vib"])
def test_a_module_that_ignores_a_callbacks_loss_is_refused(
    tmp_path: Path, source: str, kind: str
) -> None:
    module = Deaf(source)
    module.configure_model()
    before = parameters(module)
    used = Distillation() if kind == "distillation" else pruning("vib")
    with pytest.raises(UserError, match="expected training_step of Deaf") as caught:
        make_trainer(tmp_path, [used]).fit(module, datamodule=OwnData())
    assert type(used).__name__ in str(caught.value)
    after = {name: value for name, value in parameters(module).items() if "gates" not in name}
    assert_same(before, after)  # not one step was made


def test_a_module_that_ignores_it_trains_where_no_callback_has_a_loss(
    tmp_path: Path, source: str
) -> None:
    module = Deaf(source)
    make_trainer(tmp_path, [pruning("wanda")], STEPS).fit(module, datamodule=OwnData())
    assert module.phase == "pruned"
