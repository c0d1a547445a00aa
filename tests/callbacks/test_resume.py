"""Interrupted and resumed fits, and fits of two processes, end like plain ones."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune import PrunableLM, load_pruned
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomState,
)
from tests.tiny_fit import (
    Watch,
    assert_same,
    logits,
    make_data,
    make_trainer,
    save_model,
    write_text,
)
from tests.two_ranks import fit

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class Pause(Callback):
    """Uses up random numbers, as an evaluation between two runs may."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
            draw()


def run(folder: Path, source: str, ckpt_path: str | None = None, **options: Any) -> tuple[Any, ...]:
    """A fit with dropout and a checkpoint after each step; returns all that must be the same."""
    watch, module = Watch(), PrunableLM(source, dtype="float32", learning_rate=1e-2)
    adapter = options.pop("adapter", "auto")
    report = GainLossReport(rounds=0)
    callbacks = [
        RandomState(),
        FASPPruning(samples=8, length=16),
        LoRARecovery(rank=2, dropout=0.3, dtype=adapter),
    ]
    callbacks += [Distillation(), report, ExportCheckpoint(), watch]
    callbacks += [] if ckpt_path is None else [Pause()]
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(
        folder, [*callbacks, saver], enable_checkpointing=True, **{"max_steps": 6, **options}
    )
    data = make_data(folder.parent, length=16, batch_size=12)  # four batches an epoch
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return watch, module, report, trainer


@pytest.mark.parametrize(
    ("precision", "adapter"),
    [("32-true", "auto"), ("bf16-true", "auto"), ("bf16-true", "float32"), ("bf16-mixed", "auto")],
)
def test_a_resumed_fit_ends_like_an_uninterrupted_one(tmp_path: Path, precision: Any, adapter: str):
    source = save_model(tmp_path / "dense")
    options: dict[str, Any] = {
        "precision": precision,
        "adapter": adapter,
        "accumulate_grad_batches": 1,
    }
    whole = run(tmp_path / "whole", source, **options)
    assert whole[3].num_training_batches == 4
    steps = [1, 3, 4, 5, 6] if adapter == "auto" else [3]
    for step in steps:
        path = str(tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt")
        torch.manual_seed(99)
        again = run(tmp_path / f"from{step}", source, path, **options)
        assert_same(again[0].batches, whole[0].batches[step:], f"batches after {step}")
        if step < 6:  # a finished fit does not train again
            assert_same(again[0].end, whole[0].end, f"weights after {step}")
            assert_same(again[0].kept, whole[0].kept, f"optimizer after {step}")
        assert_same(again[0].logits, whole[0].logits)
        assert_same(dict(again[1].model.state_dict()), dict(whole[1].model.state_dict()))
        assert_same(again[2].models, whole[2].models)
        report = json.loads((tmp_path / f"from{step}" / "report.json").read_text())
        assert report["seconds"].keys() == {"calibrate_and_prune", "recover"}


def test_a_resumed_fit_with_accumulation_ends_like_an_uninterrupted_one(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "max_steps": 4}
    whole = run(tmp_path / "whole", source, **options)
    for step in (1, 2, 3):
        path = str(tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt")
        again = run(tmp_path / f"from{step}", source, path, **options)
        assert_same(again[0].end, whole[0].end, f"weights after {step}")
        assert_same(again[0].kept, whole[0].kept, f"optimizer after {step}")


def test_random_states_come_back(tmp_path: Path):
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.rand(3).tolist(), torch.rand(3)

    random.gauss(0, 1)
    saved = RandomState()
    state = saved.state_dict()
    torch.save(state, tmp_path / "state.pt")
    expected = draw()
    draw()
    saved.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trainer = make_trainer(tmp_path)
    saved.on_train_start(trainer, None)
    assert_same(draw(), expected)
    saved.on_train_start(trainer, None)  # once only
    assert draw() != expected


# --- two processes ---------------------------------------------------------------------------


def test_a_process_may_have_nothing_to_measure(tmp_path: Path):
    data = make_data(tmp_path, validation_tokens=16)  # one window
    module = PrunableLM(save_model(tmp_path / "dense"), dtype="float32")
    module.configure_model()
    found: list[Any] = []
    for rank in (0, 1):
        strategy = SimpleNamespace(
            reduce=lambda sums, reduce_op: found.append(sums) or sums + 1, broadcast=lambda own: own
        )
        trainer: Any = SimpleNamespace(
            datamodule=data,
            global_rank=rank,
            world_size=2,
            is_global_zero=False,
            lightning_module=module,
            strategy=strategy,
        )
        data.trainer = trainer
        GainLossReport(rounds=0, prompts=[]).measure(trainer, module, "dense")
    assert [sums[1].item() for sums in found] == [15, 0]


def test_two_processes_do_what_one_does(tmp_path: Path):
    save_model(tmp_path / "dense")
    write_text(tmp_path)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tests" / "two_ranks.py"), str(tmp_path), "2"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    fit(tmp_path, 1)
    one, first, second = (
        torch.load(tmp_path / f"end{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    assert_same(first, second)
    assert first["layout"] == one["layout"]
    torch.testing.assert_close(first["end"], one["end"], rtol=1e-3, atol=1e-4)
    assert first["before"] == pytest.approx(one["before"], rel=1e-6)
    assert first["after"] == pytest.approx(one["after"], rel=1e-4)
    assert_same(logits(load_pruned(tmp_path / "run2" / "pruned")), first["logits"])
    reports = [json.loads((tmp_path / f"run{n}" / "report.json").read_text()) for n in (1, 2)]
    for name, entry in reports[0]["models"].items():
        other = reports[1]["models"][name]
        assert other["perplexity"] == pytest.approx(entry["perplexity"], rel=1e-3)
        assert other["parameters"] == entry["parameters"]
