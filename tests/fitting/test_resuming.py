"""Fits that go on with other settings than their checkpoint was made with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune import PrunableLM
from lit_prune.callbacks import FASPPruning, LoRARecovery
from lit_prune.errors import UserError
from lit_prune.fitting.resuming import go_on, settings
from tests.tiny_fit import Watch, assert_same, make_data, make_trainer, save_model

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

STEPS = 6


def run(folder: Path, resume: Path | None = None, **options: Any) -> Watch:
    """A fit with a checkpoint after each step."""
    module = PrunableLM(str(folder.parent / "dense"), **{"dtype": "float32", **options})
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    watch = Watch()
    callbacks = [FASPPruning(samples=4, length=16), LoRARecovery(rank=2), watch, saver]
    trainer = make_trainer(folder, callbacks, STEPS, enable_checkpointing=True)
    data = make_data(folder.parent)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return watch


def test_the_learning_rate_and_weight_decay_are_those_asked_for_now(tmp_path: Path) -> None:
    save_model(tmp_path / "dense")
    old: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "warmup": 0.5}
    new: dict[str, Any] = {"learning_rate": 3e-4, "weight_decay": 0.02, "warmup": 0.5}
    rates = run(tmp_path / "old", **old).rates
    expected = [rate * 3e-2 for rate in rates]
    start = tmp_path
    for step in (2, 4):  # while the rate rises, and while it falls
        start = tmp_path / "old" / f"step={step}.ckpt"
        found = run(tmp_path / f"from{step}", start, **new)
        assert found.rates == pytest.approx(expected[step:])
        assert [group["weight_decay"] for group in found.kept["param_groups"]] == [0.02]
        # and from there on to the bit
        middle = tmp_path / f"from{step}" / f"step={step + 1}.ckpt"
        again = run(tmp_path / f"again{step}", middle, **new)
        assert again.rates == found.rates[1:]
        assert_same(again.end, found.end)
        assert_same(again.kept, found.kept)
    # of the rest of the schedule no checkpoint says anything
    constant = run(tmp_path / "constant", start, **{**old, "schedule": "constant"})
    assert constant.rates[1:] == [1e-2]


def checkpoint(**options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a checkpoint matters here, and the settings of its module."""
    module = PrunableLM("somewhere", **options)
    rate = module.optimization["lr"]
    group = {"lr": 0.3 * rate, "initial_lr": rate, "weight_decay": 0.0, "params": [0]}
    other = {"lr": 7.0, "weight_decay": 0.5, "params": [1]}
    found = {
        "lit_prune": {"dtype": "bfloat16", "gates": None, "training": settings(module)},
        "optimizer_states": [{"state": {}, "param_groups": [group, other]}],
        "lr_schedulers": [{"base_lrs": [rate, 7.0], "_last_lr": [0.3 * rate, 7.0]}],
    }
    return found, settings(module)


def asked(**options: Any) -> dict[str, Any]:
    return settings(PrunableLM("somewhere", **options))


def test_the_same_settings_change_nothing() -> None:
    found, same = checkpoint(learning_rate=0.7)
    before = copy.deepcopy(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(found, same)
        del found["lit_prune"]["training"]  # of an earlier version
        go_on(found, asked(learning_rate=0.1))
    del before["lit_prune"]["training"]
    assert_same(found, before)


def test_rates_and_decays_of_other_groups_stay() -> None:
    found, _ = checkpoint(learning_rate=0.5)
    go_on(found, asked(learning_rate=0.25, weight_decay=0.1))
    first, second = found["optimizer_states"][0]["param_groups"]
    assert (first["lr"], first["initial_lr"], first["weight_decay"]) == (0.075, 0.25, 0.1)
    assert second == {"lr": 7.0, "weight_decay": 0.5, "params": [1]}
    assert found["lr_schedulers"] == [{"base_lrs": [0.25, 7.0], "_last_lr": [0.075, 7.0]}]


def test_a_rate_of_zero_can_be_raised() -> None:
    found, _ = checkpoint(learning_rate=0.0)
    go_on(found, asked(learning_rate=0.25))
    assert found["lr_schedulers"][0]["base_lrs"] == [0.25, 7.0]


def test_optimizers_of_masks_stay() -> None:
    found, _ = checkpoint(learning_rate=0.5)
    found["lit_prune"]["gates"] = {"seed": 0}
    before = copy.deepcopy(found)
    go_on(found, asked(learning_rate=0.25, optimizer="adamw8bit"))
    assert_same(found, before)


def test_another_optimizer_is_refused() -> None:
    found, _ = checkpoint()
    with pytest.raises(UserError, match=r"made with, adamw, got adamw8bit, .*start anew$"):
        go_on(found, asked(optimizer="adamw8bit"))
    del found["optimizer_states"]  # of a checkpoint of weights alone
    go_on(found, asked(optimizer="adamw8bit"))


def test_another_dtype_is_told() -> None:
    found, _ = checkpoint()
    with pytest.warns(UserWarning, match=r"stay bfloat16: dtype bfloat16 \(here float32\)$"):
        go_on(found, asked(dtype="float32"))
    found["lit_prune"]["training"]["dtype"] = "auto"  # it was bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go_on(found, asked(dtype="bfloat16"))
