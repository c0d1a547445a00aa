"""What a fit's report has beside the table, and that a resumed fit writes the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger

from lit_prune import PrunableLM
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomState,
)
from lit_prune.errors import UserError
from lit_prune.reporting.configuration import run_config
from lit_prune.reporting.html import render
from lit_prune.reporting.samples import PROMPTS, continuations
from tests.method_table import METHODS
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_tokenizer, make_trainer, save_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)
PROMPT = "w1 w2 w3"


class Recorder(DummyLogger):
    """Notes what Lightning logs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        self.rows.append((step, dict(metrics)))


def run(
    folder: Path, source: str, steps: list[Callback], resume: str | None = None, **options: Any
) -> tuple[dict[str, Any], Recorder, PrunableLM]:
    """A fit with a report, a log and a checkpoint after each step."""
    module, recorder = PrunableLM(source, dtype="float32", learning_rate=1e-2), Recorder()
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    report = GainLossReport(rounds=0, prompts=[PROMPT])
    defaults = {"max_steps": 6, "log_every_n_steps": 1, "logger": recorder}
    trainer = make_trainer(
        folder,
        [RandomState(), *steps, report, ExportCheckpoint(), saver],
        enable_checkpointing=True,
        **{**defaults, **options},
    )
    data = make_data(folder.parent)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), recorder, module


def iterative() -> list[Callback]:
    """Trains dense, then twice pruned: keys of the log change in the middle of an epoch."""
    options: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2, "axes": ["channel"]}
    return [FASPPruning(0.3, start=2, iterations=2, every=2, **options), LoRARecovery(rank=2)]


def masks() -> list[Callback]:
    return [METHODS["vib"].make(), LoRARecovery(rank=2), Distillation()]


@pytest.mark.parametrize("steps", [iterative, masks])
def test_curves_are_what_is_logged_and_survive_a_resume(tmp_path: Path, steps: Any):
    source = save_model(tmp_path / "dense")
    report, recorder, module = run(tmp_path / "whole", source, steps())
    logged: dict[str, dict[int, float]] = {}
    for step, row in recorder.rows:
        for name, value in row.items():
            logged.setdefault(name, {})[step] = value
    curves = report["curves"]
    assert {*curves} == {*logged} - {"epoch", "prune/parameters"}
    for name, points in curves.items():
        assert points == [[step, logged[name][step]] for step, _ in points], name
    cut = 4
    assert [step for step, _ in curves["train/recovery_loss"]] == [4, 5]
    if "masks/task" in curves:
        assert [step for step, _ in curves["masks/lambda_1"]] == list(range(cut))
        assert [step for step, _ in curves["train/dense_loss"]] == list(range(cut))
        assert curves["masks/target"][-1][1] == pytest.approx(0.2)
    else:
        assert [step for step, _ in curves["train/dense_loss"]] == [0, 1]
        assert [step for step, _ in curves["train/pruned_loss"]] == [2, 3]
        assert [step for step, _ in curves["prune/sparsity"]] == [2, 4]
    assert curves["prune/sparsity"][-1][1] == report["sparsity"]["decoder"]

    for step in (1, 3, 4, 5):
        path = str(tmp_path / "whole" / "checkpoints" / f"step={step}.ckpt")
        again, _, _ = run(tmp_path / f"from{step}", source, steps(), path)
        assert without_times(again) == without_times(report), step
        assert page(tmp_path / f"from{step}") == page(tmp_path / "whole"), step
    assert module.findings["scores"] == report["findings"]["scores"]


def without_times(report: dict[str, Any]) -> str:
    """A report's file but for times."""
    return json.dumps({**report, "seconds": list(report["seconds"])})


def page(folder: Path) -> str:
    """The page of a run but for times, having held that it is that of its report.json."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (folder / "report.html").read_text(encoding="utf-8") == render(report)
    return render({**report, "seconds": {}})


def test_steps_are_those_that_lightning_logs(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    options: dict[str, Any] = {"log_every_n_steps": 2, "accumulate_grad_batches": 2}
    report, recorder, _ = run(tmp_path / "run", source, iterative(), **options)
    losses = [*report["curves"]["train/dense_loss"], *report["curves"]["train/pruned_loss"]]
    losses += report["curves"]["train/recovery_loss"]
    logged = [step for step, row in recorder.rows if "epoch" in row]
    assert [step for step, _ in losses] == logged == [1, 3, 5]
    report, _, _ = run(tmp_path / "none", source, iterative(), log_every_n_steps=0)
    assert report["curves"].keys() == {"prune/sparsity"}


def test_layers_and_scores_are_those_of_the_cut(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    pruning = METHODS["cce"].make()
    report, _, module = run(tmp_path / "run", source, [pruning], max_steps=0)
    of, left = module.layout.of, module.structure.widths
    assert left.shared["hidden"] < of.shared["hidden"]
    for axis in ("channel", "group", "query", "value"):
        assert report["layers"][axis] == {
            "dense": [sizes[axis] for sizes in of.layers],
            "kept": [sizes[axis] for sizes in left.layers],
        }
    shared = {"dense": [of.shared["hidden"]], "kept": [left.shared["hidden"]]}
    assert report["layers"]["hidden"] == shared
    # of the last decision: as many units stay as the model has left
    scores = report["findings"]["scores"]
    assert all(histogram["zeros"] == 0 for histogram in scores.values())
    assert sum(scores["channel"]["kept"]) == sum(sizes["channel"] for sizes in left.layers)
    assert sum(scores["hidden"]["kept"]) == left.shared["hidden"]


def test_layerwise_scores_divide_where_the_cut_does(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    report, _, module = run(tmp_path / "run", source, [METHODS["fasp"].make()], max_steps=0)
    for axis in ("group", "channel"):
        found = report["findings"]["scores"][axis]
        before, after = module.layout.of.layers, module.structure.widths.layers
        pairs = [(a[axis], b[axis]) for a, b in zip(before, after, strict=True)]
        cut = [(whole, kept) for whole, kept in pairs if kept < whole]  # others are not scored
        assert sum(found["kept"]) == sum(kept for _, kept in cut)
        assert sum(found["removed"]) == sum(whole - kept for whole, kept in cut) > 0


def test_generations_are_those_of_each_model(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    report, _, module = run(
        tmp_path / "run", source, [METHODS["fasp"].make(), LoRARecovery(rank=2)]
    )
    (found,) = report["generations"]
    assert list(found) == ["prompt", "dense", "pruned", "recovered"]
    dense = PrunableLM(source, dtype="float32")
    dense.configure_model()
    for name, owner in (("dense", dense), ("recovered", module)):
        assert found[name] == continuations(owner.model, make_tokenizer(), [PROMPT])[PROMPT]
    assert GainLossReport().prompts == list(PROMPTS)


def test_without_a_tokenizer_or_prompts_nothing_is_written(tmp_path: Path):
    for number, prompts in enumerate((None, [])):
        tokenizer = None if prompts is None else make_tokenizer()
        module = PrunableLM.from_model(tiny_model("llama"), tokenizer)
        report = GainLossReport(rounds=0, prompts=prompts)
        trainer = make_trainer(tmp_path / str(number), [report], 0)
        data = make_data(tmp_path)
        data.tokenizer = make_tokenizer()
        trainer.fit(module, datamodule=data)
        assert module.report is not None
        assert module.report["generations"] == []


def test_seed_and_names_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    report, _, _ = run(tmp_path / "run", save_model(tmp_path / "dense"), [], max_steps=1)
    assert (report["seed"], report["pretrained"], report["config"]) == (17, "dense", None)
    assert report["stock"] is True


class Saves(SaveConfigCallback):
    """The command line's, without a command line."""

    def __init__(self) -> None:
        parser: Any = LightningArgumentParser()
        super().__init__(parser, parser.parse_args([]))


def test_configuration_is_that_of_a_command_line_only(tmp_path: Path):
    content = {
        "model": {"pretrained": "/home/someone/models/mine", "token": True},
        "data": {"train": ["/home/someone/a.txt", "wiki:b"], "validation_tokens": 16},
        "logger": {"init_args": {"api_key": "s3cret", "project": "p"}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    trainer: Trainer = make_trainer(tmp_path)
    assert run_config(trainer) is None  # a file of somebody else
    trainer = make_trainer(tmp_path, [Saves()])
    expected = copy.deepcopy(content)
    expected["model"]["pretrained"] = "mine"
    expected["data"]["train"] = ["a.txt", "wiki:b"]
    expected["logger"]["init_args"]["api_key"] = "(hidden)"
    assert run_config(trainer) == expected
    assert run_config(make_trainer(tmp_path / "other", [Saves()])) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": "report.html"}, "expected another suffix"),
        ({"prompts": ["a", ""]}, "expected prompts with text"),
        ({"rounds": -1}, "expected rounds"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        GainLossReport(**options)


def test_an_older_checkpoint_has_no_curves():
    report = GainLossReport()
    report.curves = {"a": [[0, 1.0]]}
    report.load_state_dict({"models": {}, "notes": []})
    assert (report.curves, report.texts) == ({}, {})
    assert torch.is_grad_enabled()
