from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune import PrunableLM
from lit_prune.callbacks import Distillation, LoRARecovery, RandomState
from lit_prune.callbacks.vib import VIBPruning
from lit_prune.errors import UserError
from lit_prune.masks.bottleneck import Gates
from tests.structure.tiny import tiny_model
from tests.tiny_fit import (
    Watch,
    assert_same,
    logits,
    make_data,
    make_tokenizer,
    make_trainer,
    parameters,
    save_model,
    write_text,
)
from tests.vib_fit import fitted, pruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:expected learning rates that sum"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def fit(folder: Path, source: str, ckpt_path: str | None = None, **options: Any) -> Any:
    module, watch = PrunableLM(source, dtype="float32", learning_rate=1e-2), Watch()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    steps: list[Any] = [RandomState(), pruning(steps=4, **options), LoRARecovery(rank=2)]
    trainer = make_trainer(
        folder, [*steps, Distillation(), watch, saver], 6, enable_checkpointing=True
    )
    data = make_data(folder.parent)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, watch


def test_a_resumed_fit_ends_the_same(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense", "llama-tied")
    module, watch = fit(tmp_path / "first", source)
    for step in (1, 3, 4, 5):
        path = str(tmp_path / "first" / f"step={step}.ckpt")
        again, other = fit(tmp_path / f"again{step}", source, path)
        assert_same(other.end, watch.end)
        assert other.rates == pytest.approx(watch.rates[step:])
        assert again.layout.to_dict() == module.layout.to_dict()
        assert again.history == module.history
        assert torch.equal(logits(again.model), logits(module.model))


def test_masks_of_other_units_are_not_gone_on_with(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense", "llama-tied")
    fit(tmp_path / "first", source)
    path = str(tmp_path / "first" / "step=2.ckpt")
    with pytest.raises(UserError, match="got one with protected_layers") as caught:
        fit(tmp_path / "again", source, path, protected_layers=[1])
    assert "\n" not in str(caught.value)


class Stop(Callback):
    """Breaks a fit off while masks train; listed behind the pruning."""

    def on_train_batch_end(self, trainer: Any, *args: Any, **options: Any) -> None:
        if trainer.global_step == 2:
            raise ValueError("stop")


@pytest.mark.parametrize("pruning_first", [True, False])
def test_a_fit_that_is_broken_off_leaves_a_module_as_it_was(
    tmp_path: Path, pruning_first: bool
) -> None:
    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    callbacks = [pruning(), Distillation()][:: 1 if pruning_first else -1]
    trainer = make_trainer(tmp_path, [*callbacks, Stop()], 8)
    with pytest.raises(ValueError, match="stop"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert torch.equal(logits(module.model), logits(tiny_model("llama")))
    assert all(p.requires_grad for p in module.model.parameters())
    assert all(part.training for part in module.model.modules())
    left = (module.optimization_of, module.gates, module.loss_term, module.pruning_ahead)
    assert left == (None, None, None, False)


def test_a_second_fit_starts_with_new_masks(tmp_path: Path) -> None:
    other = fitted(tmp_path / "other", pruning(seed=3), name="llama")
    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer(), learning_rate=1e-2)
    with pytest.raises(ValueError, match="stop"):
        make_trainer(tmp_path, [pruning(), Stop()], 8).fit(module, datamodule=make_data(tmp_path))
    module.gates = Gates(module.structure.widths, ["channel"])  # of no checkpoint
    trainer = make_trainer(tmp_path, [pruning(seed=3)], 8)
    trainer.fit(module, datamodule=make_data(tmp_path / "other"))
    assert module.layout.to_dict() == other.layout.to_dict()
    assert_same(parameters(module.model), parameters(other.model))


@pytest.mark.parametrize("name", ["gpt2", "opt"])  # have dropout
def test_gradient_checkpointing_works_while_masks_train(tmp_path: Path, name: str) -> None:
    class Runs(Callback):
        """Counts passes through each layer's norm."""

        def __init__(self) -> None:
            self.number = 0

        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            for norm in pl_module.model.modules():
                if isinstance(norm, torch.nn.LayerNorm):
                    norm.register_forward_hook(self.count)

        def count(self, *_: Any) -> None:
            self.number += 1

    modules, runs = [], []
    for enabled in (False, True):
        watch = Runs()
        how = {"keep_best": False, "steps": 4}
        modules.append(
            fitted(
                tmp_path, pruning(**how), watch, name=name, steps=4, gradient_checkpointing=enabled
            )
        )
        runs.append(watch.number)
    outside = 4  # the final norm
    assert runs[1] - outside == 2 * (runs[0] - outside) == 2 * 4 * 6
    assert modules[0].layout.to_dict() == modules[1].layout.to_dict()
    assert_same(parameters(modules[0].model), parameters(modules[1].model))
    assert all(part.training for part in modules[1].model.modules())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": ["query"]}, "axes out of group, channel, hidden for VIB, got query"),
        ({"axes": []}, "axes out of group, channel, hidden for VIB, got none"),
        ({"steps": 0}, "steps of at least 1 and a rate above 0, got 0"),
        ({"rate": 0.0}, "steps of at least 1 and a rate above 0, got"),
        ({"rate": math.nan}, "steps of at least 1 and a rate above 0, got"),
        ({"mean_rate": 0.0}, "a mean_rate above 0, got 0.0"),
        ({"kl_scale": -1.0}, "a kl_scale of at least 0 or auto, got -1"),
        ({"kl_scale": "full"}, "a kl_scale of at least 0 or auto, got 'full'"),
        ({"multiple": 7}, "a multiple out of 0, 8, 64, 128, 256, got 7"),
        ({"threshold": "half"}, "threshold to be one of exact, zero, got 'half'"),
        (
            {"norm_rescale": "calibrated"},
            "norm_rescale to be one of masked, none, got",
        ),
        ({"sparsity": 1.0}, "a sparsity from 0 to below 1"),
        ({"per_layer_ratio": 0.3}, "a sparsity, since masks decide"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"expected {text}") as caught:
        VIBPruning(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "module", "text"),
    [
        ("llama", {"sparsity": 0.95, "multiple": 64}, {}, "can reach, got 0.95; the most is"),
        ("llama", {"protected_layers": [3]}, {}, "protected layers from 0 to 2, got 3"),
        (
            "llama",
            {"protected_layers": [1], "axes": ["group", "channel"]},
            {"stock": True},
            "no protected layers under --stock",
        ),
        ("llama", {}, {"stock": True}, "expected axes under --stock .*got 'hidden'"),
        ("bloom", {}, {"stock": True}, "--stock that the config of bloom"),
        ("falcon-7b", {}, {}, "units to spare, got 'group'"),
        ("llama", {"steps": 9}, {}, "a fit of at least 9 steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, name: str, options: Any, module: Any, text: str
) -> None:
    wrapped = PrunableLM.from_model(tiny_model(name), make_tokenizer(), **module)
    trainer = make_trainer(tmp_path, [pruning(**options)], 8)
    with pytest.raises(UserError, match=text) as caught:
        trainer.fit(wrapped, datamodule=make_data(tmp_path))
    assert "\n" not in str(caught.value)
    assert trainer.global_step == 0
    assert wrapped.gates is None
    assert_same(parameters(wrapped.model), parameters(tiny_model(name)))


@pytest.mark.filterwarnings("default:expected learning rates that sum")
def test_too_small_a_sum_of_rates_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"sum up to 20 or more, got 1.8 in 6 steps from 0.5"):
        fitted(tmp_path, pruning())


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    found = VIBPruning().options()
    expected = {
        "axes": ["group", "channel", "hidden"],
        "threshold": "exact",
        "multiple": 128,
        "weight_update": True,
        "rate": 0.05,
        "mean_rate": None,
        "kl_scale": "auto",
    }
    assert expected.items() <= found.items()
    assert VIBPruning(0.6).options()["rate"] == 0.1
    assert not {"allocation", "start", "iterations", "every"} & found.keys()


def test_two_processes_train_the_same_masks_with_other_noise(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", "llama")
    write_text(tmp_path)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tests" / "vib_ranks.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(one["mu"]) == 4
    assert not set(one["seeds"]) & set(two["seeds"])
    for key in ("mu", "layout", "parameters"):
        assert_same(one[key], two[key])
