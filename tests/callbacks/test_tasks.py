"""Tasks in a fit: of the dense, the pruned and the recovered model, and the fit doesn't notice."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_prune import PrunableLM, load_pruned
from lit_prune.callbacks import (
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomState,
    TaskEvaluation,
)
from lit_prune.errors import UserError
from lit_prune.evaluation.tasks import evaluate_tasks
from tests.evaluation.small_tasks import make_tokenizer, records, write
from tests.tiny_fit import Watch, assert_same, make_data, make_trainer, save_model, write_text

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")

NAMES = ["piqa", "arc_easy", "winogrande", "boolq"]


def prepare(folder: Path) -> str:
    """Write a tiny model with a tokenizer for tasks, and the tasks but BoolQ."""
    source = save_model(folder / "dense", max_position_embeddings=128)
    make_tokenizer().save_pretrained(source)
    for name in NAMES[:-1]:
        write(folder / "tasks", name, records(name, 30))
    return source


def run(folder: Path, source: str, *, tasks: bool = True, ckpt_path: str | None = None) -> Any:
    """A fit that cuts after two of five steps, with dropout; returns what watched it."""
    watch, module = Watch(), PrunableLM(source, dtype="float32", learning_rate=3e-2)
    callbacks: list[Any] = [
        RandomState(),
        FASPPruning(samples=8, length=16, start=2, sparsity=0.3),
        LoRARecovery(rank=2, dropout=0.3),
    ]
    if tasks:
        callbacks.append(TaskEvaluation(NAMES, data=str(folder.parent / "tasks"), fewshot=0))
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks += [ExportCheckpoint(), watch, saver]
    trainer = make_trainer(folder, callbacks, max_steps=5, enable_checkpointing=True)
    data = make_data(folder.parent, length=16, batch_size=12)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return watch, module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("fit")
    source = prepare(folder)
    return folder, source, *run(folder / "whole", source)


def test_each_model_is_evaluated(whole: Any) -> None:
    folder, _, _, module = whole
    found = module.findings["tasks"]
    assert list(found) == ["dense", "pruned", "recovered"]
    for model in found.values():
        assert list(model["tasks"]) == NAMES
        assert model["tasks"]["boolq"] == {"not_run": "no data: boolq.jsonl is not in tasks"}
        assert model["averages"]["acc"]["tasks"] == NAMES[:-1]
        assert model["protocol"]["data"] == "tasks"
    assert len({json.dumps(model["tasks"]) for model in found.values()}) == 3
    options: Any = {"data": folder / "tasks", "progress": False}
    pruned = load_pruned(folder / "whole" / "pruned")
    assert evaluate_tasks(pruned, make_tokenizer(), NAMES, **options) == found["recovered"]


def test_the_fit_goes_on_as_without_it(whole: Any) -> None:
    folder, source, watch, _ = whole
    bare, other = run(folder / "bare", source, tasks=False)
    assert "tasks" not in other.findings
    assert_same(bare.batches, watch.batches)
    assert_same(bare.end, watch.end)
    assert_same(bare.kept, watch.kept)
    assert_same(bare.logits, watch.logits)


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_fit_finds_the_same(whole: Any, step: int) -> None:
    folder, source, watch, module = whole
    path = str(folder / "whole" / "checkpoints" / f"step={step}.ckpt")
    again, other = run(folder / f"from{step}", source, ckpt_path=path)
    assert_same(again.end, watch.end)
    assert_same(again.logits, watch.logits)
    assert other.findings["tasks"] == module.findings["tasks"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_find_the_same(tmp_path: Path, strategy: str) -> None:
    _processes(tmp_path, strategy)


def _processes(folder: Path, strategy: str) -> None:
    from tests.task_ranks import fit

    prepare(folder)
    write_text(folder)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.task_ranks", str(folder), strategy, "2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = fit(folder, strategy, 1)
    first, second = (json.loads((folder / f"found2-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert list(first) == ["dense", "pruned", "recovered"]
    assert first["dense"] == one["dense"]
    for name in ("pruned", "recovered"):
        assert list(first[name]["tasks"]) == list(one[name]["tasks"])


def test_mistakes_are_told_before_the_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="limit of at least 1, got 0"):
        TaskEvaluation("piqa", limit=0)
    with pytest.raises(UserError, match="a folder with jsonl files of tasks"):
        TaskEvaluation("piqa", data=str(tmp_path / "none"))
    source = prepare(tmp_path)
    module = PrunableLM(source, dtype="float32")
    trainer = make_trainer(tmp_path)
    evaluation = TaskEvaluation([], data=str(tmp_path / "tasks"))
    with pytest.raises(UserError, match="at least one task"):
        evaluation.setup(trainer, module, "fit")
    evaluation.setup(trainer, module, "validate")
    monkeypatch.setitem(sys.modules, "lit_prune.evaluation.task_loading", None)
    monkeypatch.delattr("lit_prune.evaluation.task_loading", raising=False)
    with pytest.raises(UserError, match="expected the package lm-eval"):
        TaskEvaluation("piqa").setup(trainer, module, "fit")


def test_a_strategy_without_a_whole_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.strategy, "__class__", DeepSpeedStrategy)
    module = PrunableLM(prepare(tmp_path), dtype="float32")
    with pytest.raises(UserError, match="one device, or the strategy ddp or fsdp2"):
        TaskEvaluation("piqa").setup(trainer, module, "fit")


def test_a_report_before_it_is_refused(tmp_path: Path) -> None:
    module: Any = PrunableLM(prepare(tmp_path), dtype="float32")
    evaluation = TaskEvaluation("piqa", data=str(tmp_path / "tasks"))
    late = make_trainer(tmp_path, [GainLossReport(), evaluation])
    with pytest.raises(UserError, match="TaskEvaluation before GainLossReport, got it after"):
        evaluation.setup(late, module, "fit")
    evaluation.setup(make_trainer(tmp_path, [evaluation, GainLossReport()]), module, "fit")


def test_a_process_waits_for_a_slow_one(tmp_path: Path) -> None:
    """Longer than the process group's own timeout."""
    code = """if True:
        import sys, time
        from datetime import timedelta
        import torch.distributed as dist
        from lit_prune.callbacks import TaskEvaluation
        file, rank = sys.argv[1], int(sys.argv[2])
        dist.init_process_group(
            "gloo", f"file://{file}", timedelta(seconds=2), world_size=2, rank=rank
        )
        evaluation = TaskEvaluation("piqa")
        dist.barrier()
        for turn in range(2):
            time.sleep(3 * (rank != turn))
            found = evaluation._gathered({"of": rank}, 2)
            assert found == [{"of": 0}, {"of": 1}], found
        """
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    root = str(Path(__file__).resolve().parents[2])
    options: Any = {"stderr": subprocess.PIPE, "text": True, "cwd": root}
    ranks = [subprocess.Popen([*command, str(rank)], **options) for rank in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-2000:]


def test_a_mistake_on_one_process_stops_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process' part stands for one that it would send."""
    source = prepare(tmp_path)
    module: Any = PrunableLM(source, dtype="float32")
    module.configure_model()
    evaluation = TaskEvaluation(NAMES, data=str(tmp_path / "tasks"))
    evaluation.names = NAMES

    class Two:
        world_size, global_rank, is_global_zero = 2, 1, False

    def gathered(part: Any, world: int) -> list[Any]:
        return ["expected a file, got none", part]

    monkeypatch.setattr(evaluation, "_gathered", gathered)
    trainer: Any = Two()
    with pytest.raises(UserError, match=r"^expected a file, got none$"):
        evaluation.measure(trainer, module, "dense")
