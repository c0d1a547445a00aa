"""When a fit's model is cut: one callback in several fits, several callbacks in one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback

from lit_prune import PrunableLM
from lit_prune.callbacks import (
    CoupledComponentPruning,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    MagnitudePruning,
    VIBPruning,
    WandaPruning,
)
from lit_prune.cutting.callback import sizes_of
from lit_prune.errors import UserError
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_tokenizer, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
SMALL: dict[str, Any] = {"samples": 4, "length": 16}


def module_of(name: str = "llama") -> PrunableLM:
    return PrunableLM.from_model(tiny_model(name), make_tokenizer())


@pytest.mark.parametrize(
    "callback",
    [
        FASPPruning(0.2, **SMALL),
        CoupledComponentPruning(0.3, **SMALL),
        CoupledComponentPruning(iterations=2, **SMALL),
    ],
)
def test_a_callback_prunes_in_each_fit(callback: Any) -> None:
    first, again = module_of(), module_of()
    trainer_of(callback).fit(first, datamodule=Windows())
    other = module_of("gpt2")  # whose heads share no keys
    if "query" in callback.axes:
        trainer_of(callback).fit(other, datamodule=Windows())
        assert other.history[0]["options"]["axes"] == ["group", "channel", "hidden"]
    trainer_of(callback).fit(again, datamodule=Windows())
    assert again.phase == "pruned"
    assert again.history == first.history
    assert again.layout.to_dict() == first.layout.to_dict()
    with pytest.raises(UserError, match=r"a dense model to prune, got one in phase 'pruned'"):
        trainer_of(callback).fit(again, datamodule=Windows())


@pytest.mark.parametrize("starts", [(0, 0), (1, 2), (2, 0)])
def test_two_pruning_callbacks_in_one_fit_are_refused(
    tmp_path: Path, starts: tuple[int, int]
) -> None:
    kinds = zip((FASPPruning, WandaPruning), starts, strict=True)
    callbacks = [kind(start=start, **SMALL) for kind, start in kinds]
    module = module_of()
    trainer = make_trainer(tmp_path, [*callbacks, LoRARecovery(rank=2)], max_steps=4)
    with pytest.raises(UserError, match="one pruning callback in a fit, got FASPPruning and Wanda"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.phase == "dense"


def test_the_time_of_all_cuts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    stopwatch = SimpleNamespace(perf_counter=lambda: float(next(clock)))
    monkeypatch.setattr("lit_prune.fitting.refit.time", stopwatch)
    module = module_of()
    trainer_of(FASPPruning(0.3, iterations=3, **SMALL)).fit(module, datamodule=Windows())
    assert module.seconds["calibrate_and_prune"] == 3.0


class Once(Windows):
    """Draws the same windows each time, by a method as the README asks for."""

    def calibration_batches(self, samples: int, length: int, batch_size: int) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().calibration_batches(samples, length, batch_size)


class Shares(Callback):
    """Notes what is gone of the decoder after each cut."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_cut(self, trainer: Any, pl_module: Any) -> None:
        if not self.found:
            self.dense = sizes_of(pl_module)["decoder"]

    def on_after_cut(self, trainer: Any, pl_module: Any) -> None:
        self.found.append(1 - sizes_of(pl_module)["decoder"] / self.dense)


def test_each_cut_takes_an_equal_part() -> None:
    shares, module = Shares(), module_of()
    pruning = FASPPruning(0.3, iterations=3, **SMALL)
    trainer_of(pruning, shares).fit(module, datamodule=Windows())
    assert shares.found == pytest.approx([0.1, 0.2, 0.3], abs=0.02)


def test_each_cut_knows_what_all_take_together() -> None:
    goals: list[tuple[float, float]] = []

    class Looks(WandaPruning):
        def prune(self, calibration: Any, target: float) -> Any:
            goals.append((calibration.goal, target))
            return super().prune(calibration, target)

    trainer_of(Looks(0.2, iterations=2, **SMALL)).fit(module_of(), datamodule=Windows())
    assert goals == [(0.2, pytest.approx(0.1)), (0.2, pytest.approx(0.1 / 0.9, abs=0.01))]


NEVER: list[dict[str, Any]] = [{"max_epochs": 0}, {"limit_train_batches": 0}]


@pytest.mark.filterwarnings("ignore:expected learning rates that sum")
@pytest.mark.parametrize("options", NEVER, ids=str)
@pytest.mark.parametrize("kind", [MagnitudePruning, VIBPruning])
def test_a_fit_that_never_trains_is_none(tmp_path: Path, kind: Any, options: Any) -> None:
    module = module_of()
    pruning = VIBPruning(0.3, steps=3, multiple=0, **SMALL)
    pruning = MagnitudePruning(0.3, start=3) if kind is MagnitudePruning else pruning
    callbacks = [pruning, GainLossReport(rounds=0, prompts=[]), ExportCheckpoint()]
    trainer = make_trainer(tmp_path, callbacks, max_steps=5, **options)
    with pytest.raises(UserError, match=r"a fit of at least 3 steps, .* got 0; raise"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert not (tmp_path / "pruned").exists()
    assert not (tmp_path / "report.json").exists()
    assert (module.gates, module.loss_term, module.optimization_of) == (None, None, None)
    assert all(parameter.requires_grad for parameter in module.model.parameters())
    assert not any(part._forward_pre_hooks for part in module.model.modules())


def test_windows_set_aside_are_not_scored() -> None:
    seen: list[tuple[list[int], list[int]]] = []

    class Looks(WandaPruning):
        layerwise = False

        def score(self, calibration: Any) -> Any:
            rows = [calibration.batches, calibration.held]
            seen.append(tuple([int(b["input_ids"].sum()) for b in part] for part in rows))  # pyright: ignore
            return super().score(calibration)

    pruning = Looks(0.2, allocation="sensitivity", samples=8, length=16, batch_size=2)
    trainer_of(pruning).fit(module_of(), datamodule=Windows())
    scored, held = seen[0]
    whole = [int(b["input_ids"].sum()) for b in Windows().calibration_batches(10, 16, 2)]
    assert (scored, held) == (whole[:4], whole[4:])


def test_data_that_does_not_suffice_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    module, steps = module_of(), []

    class Count(WandaPruning):
        def on_train_batch_end(self, *args: Any, **options: Any) -> None:
            steps.append(1)
            super().on_train_batch_end(*args, **options)

    trainer = make_trainer(tmp_path, [Count(start=3, samples=10**5, length=16)], max_steps=4)
    with pytest.raises(UserError, match="100000 windows"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    trainer = trainer_of(Count(0.2, iterations=2, **SMALL))
    with pytest.raises(UserError, match=r"an argument turn .* got Once"):
        trainer.fit(module, datamodule=Once())
    assert module.phase == "dense"
    assert not steps
    trainer_of(Count(0.2, **SMALL)).fit(module, datamodule=Once())
    assert module.phase == "pruned"


def test_a_module_that_resumed_in_an_earlier_fit_is_not_taken_for_resumed_again() -> None:
    module = module_of()
    trainer_of(FASPPruning(0.2, **SMALL)).fit(module, datamodule=Windows())
    module.resumed = True  # as loading a checkpoint leaves it
    with pytest.raises(UserError, match="got one in phase 'pruned'"):
        trainer_of(FASPPruning(0.2, **SMALL)).fit(module, datamodule=Windows())


def test_a_report_forgets_an_earlier_fit() -> None:
    report = GainLossReport()
    report.models, report.notes = {"dense": {}}, ["of the first fit"]
    report.setup(trainer_of(report), module_of(), "fit")
    assert (report.models, report.notes) == ({}, [])
