"""Every method in the same fits: cut, recover, export, reload, resume; one seed, one result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_prune import PrunableLM, callbacks, load_pruned
from lit_prune.callbacks import ExportCheckpoint, GainLossReport, LoRARecovery, RandomState
from lit_prune.pruning import PruningCallback
from lit_prune.structure.counting import count_actual
from tests.method_table import METHODS
from tests.tiny_fit import (
    Watch,
    assert_same,
    logits,
    make_data,
    make_trainer,
    parameters,
    save_model,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)

CASES = [(name, family) for name, row in METHODS.items() for family in row.families]


def fit(folder: Path, method: str, family: str, resume: str | None = None) -> tuple[Any, Watch]:
    """A fit with recovery and export, a checkpoint after each step."""
    row = METHODS[method]
    source = folder.parent / "dense"
    if not source.exists():
        save_model(source, family)
    module = PrunableLM(str(source), dtype="float32", learning_rate=1e-2)
    watch = Watch()
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    steps = [RandomState(), row.make(), LoRARecovery(rank=2), GainLossReport(rounds=0)]
    trainer = make_trainer(
        folder,
        [*steps, ExportCheckpoint(), watch, saver],
        max_steps=row.steps,
        enable_checkpointing=True,
    )
    data = make_data(folder.parent)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module, watch


@pytest.mark.parametrize(("method", "family"), CASES, ids=["-".join(case) for case in CASES])
def test_cut_recover_export_reload_resume(tmp_path: Path, method: str, family: str) -> None:
    module, watch = fit(tmp_path / "run", method, family)
    (entry,) = module.history
    dense = module.layout.of
    assert entry["sparsity"]["decoder"] > 0.05
    assert module.structure.widths != dense
    left = count_actual(module.model, module.structure)
    assert entry["sparsity"]["total"] == pytest.approx(1 - left / _dense_count(tmp_path), abs=1e-6)
    reloaded = load_pruned(tmp_path / "run" / "pruned", dtype=torch.float32)
    assert_same(parameters(reloaded), parameters(module.model))
    assert torch.equal(logits(reloaded), watch.logits)

    for step in range(1, METHODS[method].steps):
        path = str(tmp_path / "run" / "checkpoints" / f"step={step}.ckpt")
        again, other = fit(tmp_path / f"resumed{step}", method, family, path)
        assert again.layout.to_dict() == module.layout.to_dict()
        assert_same(other.end, watch.end)
        assert_same(parameters(again.model), parameters(module.model))
        assert again.history == module.history


def _dense_count(folder: Path) -> int:
    return sum(p.numel() for p in load_pruned(folder / "dense").parameters())


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_one_result(tmp_path: Path, method: str) -> None:
    family = METHODS[method].families[0]
    first, _ = fit(tmp_path / "first", method, family)
    second, _ = fit(tmp_path / "second", method, family)
    assert first.layout.to_dict() == second.layout.to_dict()
    assert_same(parameters(first.model), parameters(second.model))


def test_every_method_has_a_row() -> None:
    offered = {
        name for name in callbacks.__all__ if issubclass(getattr(callbacks, name), PruningCallback)
    }
    assert offered == {row.callback for row in METHODS.values()}
