"""Faults in whole fits: memory that runs out, numbers that are none, matrices without a root."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from lit_prune import PrunableLM
from lit_prune.callbacks import (
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomPruning,
)
from lit_prune.errors import UserError
from lit_prune.loading import opening
from tests.both_ways import REFUSED, streamed, weights
from tests.method_table import METHODS
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_tokenizer, make_trainer, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*memory ran out")

#: Methods that train before they cut need steps.
CALIBRATED = [name for name, row in METHODS.items() if row.callback != "VIBPruning"]
_ITERATIVE = {"start": 0, "every": 0}


def make(method: str, **changes: Any) -> Any:
    row = METHODS[method]
    return row.make(**{k: v for k, v in _ITERATIVE.items() if k in row.options}, **changes)


def fit(folder: Path, *callbacks: Callback, model: Any = None, steps: int = 0) -> PrunableLM:
    """A fit from `folder/dense`, or of a model in memory."""
    if model is None:
        module = PrunableLM(str(folder / "dense"), dtype="float32")
    else:
        module = PrunableLM.from_model(model, make_tokenizer())
    trainer = make_trainer(folder / "run", callbacks, max_steps=steps)
    trainer.fit(module, datamodule=make_data(folder / "data"))
    return module


# --- memory ------------------------------------------------------------------------------------


def crowd(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let every FFN fail with more windows, in the backward pass where there is one."""
    forward, failures = LlamaMLP.forward, []

    def fail(windows: int) -> None:
        failures.append(windows)
        raise torch.OutOfMemoryError("out of memory")

    def careful(self: LlamaMLP, x: Tensor) -> Tensor:
        if len(x) > most and x.requires_grad:
            x.register_hook(lambda _: fail(len(x)))
        elif len(x) > most:
            fail(len(x))
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", careful)
    return failures


@pytest.mark.parametrize("method", CALIBRATED)
def test_every_method_goes_on_with_half_the_batch(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"iterations": 1} if method.startswith("cce") else {}
    whole, half = make(method, **changes), make(method, **changes, batch_size=1)
    expected = fit(tmp_path, half, model=tiny_model("llama"))
    failures = crowd(monkeypatch, 1)
    module = fit(tmp_path, whole, model=tiny_model("llama"))
    assert module.layout.to_dict() == expected.layout.to_dict()
    for value, found in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(value, found, rtol=1e-3, atol=2e-4)
    texts = module.history[0].get("warnings", [])
    assert bool(texts) == bool(failures) == (method not in ("random", "magnitude"))
    assert all(text.startswith("memory ran out with 2 calibration windows") for text in texts)
    assert len(texts) <= 2  # of different lengths


def test_the_report_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "dense")
    callback = make("fasp-iterative", length=12)
    crowd_layers = LlamaMLP.forward

    def careful(self: LlamaMLP, x: Tensor) -> Tensor:
        if x.shape[:2] == (2, 12):
            raise torch.OutOfMemoryError("out of memory")
        return crowd_layers(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", careful)
    with pytest.warns(UserWarning, match="memory ran out with 2 calibration windows of 12 tokens"):
        fit(tmp_path, callback, GainLossReport(rounds=0), ExportCheckpoint())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (text,) = report["warnings"]
    assert text.startswith("memory ran out with 2 calibration windows of 12 tokens at once")
    assert "went on with 1" in (tmp_path / "run" / "pruned" / "README.md").read_text()


def test_a_window_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd(monkeypatch, 0)
    for method in ("taylor", "fasp"):
        with pytest.raises(UserError, match="memory for a calibration window of 16 tokens") as e:
            fit(tmp_path, make(method), model=tiny_model("llama"))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("method", ["fasp", "flap", "wanda"])
def test_streamed_models_too(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert method not in REFUSED
    source = save_model(tmp_path / "dense")
    expected = weights(
        streamed(source, make(method, batch_size=1), tmp_path / "a", dtype="float32")
    )
    failures = crowd(monkeypatch, 1)
    out = streamed(source, make(method), tmp_path / "b", dtype="float32")
    assert failures
    for name, tensor in weights(out).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-3, atol=2e-4), name
    assert "memory ran out" in (out / "lit_prune.json").read_text()


# --- numbers -----------------------------------------------------------------------------------


class Spoil(Callback):
    """Puts NaN into the loss of a step, or into weights after one."""

    def __init__(self, step: int, value: float = float("nan"), *, gradient: bool = False) -> None:
        self.step, self.value, self.gradient, self.done = step, value, gradient, -1

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.done = trainer.global_step
        if trainer.global_step == self.step and not self.gradient:
            vars(pl_module)["loss"] = lambda *a, **k: (
                type(pl_module).loss(pl_module, *a, **k) * torch.tensor(self.value)
            )

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.step and self.gradient:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(tmp_path: Path, value: float) -> None:
    save_model(tmp_path / "dense")
    spoil = Spoil(2, value)
    callbacks = [FASPPruning(samples=4, length=16), LoRARecovery(rank=2), spoil, ExportCheckpoint()]
    with pytest.raises(UserError, match=rf"got {value} in step 3 \(recovery\)") as caught:
        fit(tmp_path, *callbacks, steps=5)
    assert "\n" not in str(caught.value)
    assert "go on from the last checkpoint" in str(caught.value)
    assert spoil.done == 2
    assert not (tmp_path / "run" / "pruned").exists()


def test_a_loss_of_masks_and_before_a_cut(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"in step 2 \(mask learning\); start anew with a lower"):
        fit(tmp_path, METHODS["vib"].make(), Spoil(1), model=tiny_model("llama"), steps=7)
    late = FASPPruning(samples=4, length=16, start=2)
    with pytest.raises(UserError, match=r"got nan in step 1 \(training before the cut\)"):
        fit(tmp_path, late, Spoil(0), model=tiny_model("llama"), steps=5)


def test_a_loss_of_another_process() -> None:
    def reduce(tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        return tensor + bad

    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(reduce=reduce))
    module = SimpleNamespace(_trainer=trainer, gates=None, pruning_ahead=False, global_step=4)
    bad = 0.0
    opening.check_finite(module, torch.tensor(1.0))
    with pytest.raises(UserError, match=r"got inf in step 5 \(recovery\)"):
        opening.check_finite(module, torch.tensor(float("inf")))
    bad = 1.0
    with pytest.raises(UserError, match="infinity in another process in step 5"):
        opening.check_finite(module, torch.tensor(1.0))


def test_weights_that_the_last_step_spoiled(tmp_path: Path) -> None:
    save_model(tmp_path / "dense")
    with pytest.raises(UserError, match=r"finite weights, got NaN or infinity in model\."):
        fit(tmp_path, RandomPruning(), Spoil(1, gradient=True), ExportCheckpoint(), steps=2)
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_refuses_weights_that_are_no_numbers(tmp_path: Path, method: str) -> None:
    model: Any = tiny_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[:, 5] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="finite") as caught:
        fit(tmp_path, make(method), ExportCheckpoint(), model=model, steps=METHODS[method].steps)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "pruned").exists()


@pytest.mark.parametrize("method", ["taylor", "fisher", "fusion", "cce", "cce-lora", "backprop"])
def test_gradients_that_are_no_numbers(tmp_path: Path, method: str) -> None:
    model = tiny_model("llama")

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    model.get_submodule("model.layers.1.mlp").register_forward_hook(hook)
    callback = make("mini-llm", gradient="backprop") if method == "backprop" else make(method)
    with pytest.raises(UserError, match="finite") as caught:
        fit(tmp_path, callback, model=model)
    assert "\n" not in str(caught.value)
