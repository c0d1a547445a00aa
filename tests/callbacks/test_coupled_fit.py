from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_prune import PrunableLM
from lit_prune.callbacks import CoupledComponentPruning
from lit_prune.errors import UserError
from tests import coupled_ranks
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_trainer, save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
SMALL: dict[str, Any] = {"samples": 4, "length": 16}


def fit(folder: Path, source: str, ckpt: str | None = None) -> tuple[PrunableLM, Any]:
    callback = CoupledComponentPruning(0.4, start=1, every=1, **SMALL)
    module = PrunableLM(source, dtype="float32", learning_rate=1e-3)
    trainer = make_trainer(folder, [callback], max_steps=5)
    trainer.fit(module, datamodule=make_data(folder.parent), ckpt_path=ckpt, weights_only=True)
    return module, callback


def test_a_fit_resumes_between_iterations(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense")
    module, callback = fit(tmp_path / "whole", source)
    assert callback.iteration == callback.iterations >= 2
    first = PrunableLM(source, dtype="float32", learning_rate=1e-3)
    start = CoupledComponentPruning(0.4, start=1, every=1, **SMALL)

    class Save(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 1:
                assert start.iteration == 1
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    trainer = make_trainer(tmp_path / "first", [start, Save()], max_steps=5)
    trainer.fit(first, datamodule=make_data(tmp_path))
    again, other = fit(tmp_path / "again", source, str(tmp_path / "one.ckpt"))
    assert other.iteration == callback.iteration
    assert again.layout.to_dict() == module.layout.to_dict()
    assert again.history == module.history
    expected = dict(module.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


def test_a_fit_that_ends_before_the_last_iteration_is_refused(tmp_path: Path) -> None:
    module = PrunableLM.from_model(tiny_model("llama"))
    callback = CoupledComponentPruning(0.4, start=1, every=3, **SMALL)
    trainer = make_trainer(tmp_path, [callback], max_steps=3)
    with pytest.raises(
        UserError, match="a fit of at least 4 steps, after which CCE makes its last"
    ):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.phase == "dense"


@pytest.mark.slow
def test_two_processes_choose_the_units_of_one(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tests" / "coupled_ranks.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for gradients in ("full", "lora"):
        alone = PrunableLM.from_model(tiny_model("llama"))
        trainer_of(coupled_ranks.callback(gradients)).fit(alone, datamodule=Windows())
        for rank in (0, 1):
            text = (tmp_path / f"{gradients}-{rank}.json").read_text(encoding="utf-8")
            assert json.loads(text) == alone.layout.to_dict()
