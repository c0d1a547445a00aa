"""The main job through the real command, end to end on a tiny model."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import PrunableLM, TextDataModule, load_pruned
from lit_prune.cli.front import main
from lit_prune.evaluation import perplexity as evaluation
from tests.cli.conftest import PROGRESS, Command, Workspace, snapshot
from tests.tiny_fit import write_text

#: Loads a checkpoint where this project can't be imported; prints the nats of each token.
_ELSEWHERE = """
import sys
sys.modules["lit_prune"] = None
import csv
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, trusted, ids = sys.argv[1], sys.argv[2] == "True", json.loads(sys.argv[3])
options = {"trust_remote_code": True} if trusted else {}
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
assert tokenizer("w3 w4")["input_ids"] == [6, 7], tokenizer("w3 w4")
model.generate(torch.tensor(ids[:1]), max_new_tokens=3, do_sample=False)
total = 0.0
for row in torch.tensor(ids):
    logits = model(input_ids=row[None]).logits[0, :-1].double()
    total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
print(total)
"""
_SHAPE = {
    "protocol": dict,
    "method": str,
    "options": dict,
    "sparsity": dict,
    "models": dict,
    "seconds": dict,
    "versions": dict,
    "warnings": list,
}


pytestmark = pytest.mark.usefixtures("here")


def fit(workspace: Workspace, here: Path, *args: str, **changes: Any) -> int:
    config = workspace.config(here.parent / "x.yaml", **changes)
    return main(["fit", "--config", config, "--trainer.default_root_dir", "run", *args])


def windows(workspace: Workspace, here: Path, model: Any) -> list[dict[str, torch.Tensor]]:
    """The validation windows of the workspace's configuration."""
    data = TextDataModule(
        workspace.text, length=8, batch_size=2, window=16, validation_tokens=64, cache_dir=str(here)
    )
    data.tokenizer = AutoTokenizer.from_pretrained(model)
    return list(data.val_dataloader())


def check_report(run: Path, models: tuple[str, ...], target: float = 0.2) -> dict[str, Any]:
    """Hold a report's schema, and that its numbers fit each other and the checkpoint."""
    report = json.loads((run / "report.json").read_text())
    for name, kind in _SHAPE.items():
        assert isinstance(report[name], kind), name
    assert {"text", "window", "tokens", "dtype"} <= report["protocol"].keys()
    assert report["protocol"]["text"] == "text.txt"
    assert report["protocol"]["window"] == 16
    assert report["protocol"]["dtype"] == "float32"
    assert tuple(report["models"]) == models
    dense, pruned = report["models"]["dense"], report["models"]["pruned"]
    for entry in report["models"].values():
        assert entry["bytes"] == 4 * entry["parameters"]
        assert math.isfinite(entry["perplexity"])
        assert entry["tokens_per_second"] > 0
    sparsity = report["sparsity"]
    assert sparsity["target"] == target
    for key, part in (("decoder", "decoder_parameters"), ("total", "parameters")):
        assert sparsity[key] == pytest.approx(1 - pruned[part] / dense[part], abs=1e-12)
    assert abs(sparsity["decoder"] - target) < 0.02
    steps = {"calibrate_and_prune", *(["recover"] if "recovered" in models else [])}
    assert steps <= report["seconds"].keys()
    assert {"torch", "transformers", "lightning", "peft", "lit_prune"} <= report["versions"].keys()
    model = load_pruned(run / "pruned")
    assert sum(p.numel() for p in model.parameters()) == pruned["parameters"]
    return report


def test_a_fit_through_the_command(
    workspace: Workspace, here: Path, command: Command, finished: Path
) -> None:
    """In processes of their own: a stock fit, and loading it without this project."""
    config = workspace.config(here.parent / "x.yaml")
    done = command("fit", "--config", config, "--stock", cwd=here)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(PROGRESS) for line in done.stderr.splitlines()), done.stderr
    run = here / "lit-prune-run"
    report = check_report(run, ("dense", "pruned", "recovered"))
    for number in (report["models"][name]["perplexity"] for name in report["models"]):
        assert f"{number:,.2f}" in done.stdout
    assert 'from_pretrained("lit-prune-run/pruned")' in done.stdout
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "logs",
        "pruned",
        "report.html",
        "report.json",
    }
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    modes = {path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~current_umask()}
    config_text = json.loads((run / "pruned/config.json").read_text())
    assert config_text["model_type"] == "llama"
    assert config_text["intermediate_size"] < 20
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["stock"] is True
    assert saved["model"]["pretrained"] == workspace.model

    for folder, trusted in ((run, False), (finished, True)):
        found = json.loads((folder / "report.json").read_text())
        rows = [batch["input_ids"][0] for batch in windows(workspace, here, workspace.model)]
        assert found["protocol"]["tokens"] == sum(len(row) for row in rows)
        ids = json.dumps([row.tolist() for row in rows])
        done = command(
            "-c", _ELSEWHERE, str(folder / "pruned"), str(trusted), ids, cwd=here, python=True
        )
        assert done.returncode == 0, done.stderr
        expected = found["models"]["recovered"]["perplexity"]
        nats = float(done.stdout.split()[-1]) / sum(len(row) - 1 for row in rows)
        assert math.exp(nats) == pytest.approx(expected, rel=1e-5)


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_report_is_of_the_checkpoint(workspace: Workspace, finished: Path, here: Path) -> None:
    report = check_report(finished, ("dense", "pruned", "recovered"))
    batches = windows(workspace, here, finished / "pruned")
    for folder, name in ((workspace.model, "dense"), (finished / "pruned", "recovered")):
        model = load_pruned(folder, dtype=torch.float32, attn_implementation="sdpa")
        measured = evaluation.perplexity(model, batches)
        assert measured.value == report["models"][name]["perplexity"]
    remote = AutoModelForCausalLM.from_pretrained(finished / "pruned", trust_remote_code=True)
    measured = evaluation.perplexity(remote, batches)
    assert measured.value == report["models"]["recovered"]["perplexity"]
    record = json.loads((finished / "pruned/lit_prune.json").read_text())
    assert record["stock"] is False
    (step,) = record["lineage"]
    assert step["sparsity"] == report["sparsity"]
    card = (finished / "pruned/README.md").read_text()
    assert f"{report['models']['recovered']['perplexity']:,.2f}" in card
    assert str(finished) not in card


def test_no_recovery(workspace: Workspace, here: Path) -> None:
    assert fit(workspace, here, "--no-recovery") == 0
    report = check_report(here / "run", ("dense", "pruned"))
    model = load_pruned(here / "run/pruned", attn_implementation="sdpa")
    measured = evaluation.perplexity(model, windows(workspace, here, here / "run/pruned"))
    assert measured.value == report["models"]["pruned"]["perplexity"]
    assert {"checkpoints", "config.yaml", "report.json"} <= {
        path.name for path in (here / "run").iterdir()
    }


def test_recovery_after_no_recovery_is_recovery(workspace: Workspace, here: Path) -> None:
    assert fit(workspace, here) == 0
    (here / "run").rename(here / "whole")
    assert fit(workspace, here, "--no-recovery") == 0
    assert fit(workspace, here, "--ckpt_path", "last") == 0
    assert (here / "run/pruned/model.safetensors").read_bytes() == (
        here / "whole/pruned/model.safetensors"
    ).read_bytes()
    check_report(here / "run", ("dense", "pruned", "recovered"))


def test_recovery_goes_on_from_a_run_that_trained_before_its_cut(
    workspace: Workspace, here: Path
) -> None:
    assert fit(workspace, here, "--no-recovery", fasppruning={"start": 2}) == 0
    check_report(here / "run", ("dense", "pruned"))
    assert main(["export", "run", "--out", "apart/pruned"]) == 0
    for name in ("README.md", "model.safetensors"):  # the card has the report's figures
        exported, own = (here / place / name for place in ("apart/pruned", "run/pruned"))
        assert exported.read_bytes() == own.read_bytes()
    more = ["--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert fit(workspace, here, *more, fasppruning={"start": 2}) == 0
    report = check_report(here / "run", ("dense", "pruned", "recovered"))
    assert report["protocol"]["recovery_steps"] == 2


def test_a_second_run_is_refused_replaced_or_resumed(
    workspace: Workspace, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fit(workspace, here) == 0
    before = snapshot(here)
    capfd.readouterr()
    assert fit(workspace, here) == 2
    assert "run holds a run" in capfd.readouterr().err
    assert snapshot(here) == before

    # a finished run, resumed, writes its results again
    run = here / "run"
    weights = (run / "pruned/model.safetensors").read_bytes()
    report = json.loads((run / "report.json").read_text())
    shutil.rmtree(run / "pruned")
    (run / "report.json").unlink()
    assert fit(workspace, here, "--ckpt_path", "last") == 0
    assert (run / "pruned/model.safetensors").read_bytes() == weights
    again = check_report(run, ("dense", "pruned", "recovered"))
    for name, entry in report["models"].items():
        assert entry["perplexity"] == again["models"][name]["perplexity"]

    assert fit(workspace, here, "--overwrite", fasppruning={"axes": ["group", "channel"]}) == 0
    assert (run / "pruned/model.safetensors").read_bytes() != weights
    assert [path.name for path in here.iterdir()] == ["run"]
    (step,) = json.loads((run / "pruned/lit_prune.json").read_text())["lineage"]
    assert step["options"]["axes"] == ["group", "channel"]


def test_a_resume_with_another_pruning_is_refused_and_changes_nothing(
    workspace: Workspace, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does it write what it was asked into the run's configuration."""
    assert fit(workspace, here) == 0
    before = snapshot(here)
    capfd.readouterr()
    assert fit(workspace, here, "--ckpt_path", "last", without=["FASPPruning"]) == 2
    err = capfd.readouterr().err.splitlines()
    assert "the callback that the checkpoint was made with, FASPPruning, among" in err[-1]
    assert fit(workspace, here, "--ckpt_path", "last", fasppruning={"sparsity": 0.3}) == 2
    assert "(here 0.3): set them so, or start anew" in capfd.readouterr().err.splitlines()[-1]
    assert snapshot(here) == before


def test_a_damaged_checkpoint_is_passed_over(
    workspace: Workspace, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last one has a flipped bit in its tensors, which torch does not see."""
    assert fit(workspace, here) == 0
    run = here / "run"
    weights = (run / "pruned/model.safetensors").read_bytes()
    (run / "checkpoints/previous.ckpt").write_bytes((run / "checkpoints/last.ckpt").read_bytes())
    content = bytearray((run / "checkpoints/last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "checkpoints/last.ckpt").write_bytes(content)
    capfd.readouterr()
    assert fit(workspace, here, "--ckpt_path", "run/checkpoints/last.ckpt") == 2
    assert "last.ckpt, which is damaged (wrong checksum of " in capfd.readouterr().err
    assert fit(workspace, here, "--ckpt_path", "last") == 0
    assert "last.ckpt is damaged" in (err := capfd.readouterr().err)
    assert "going on from run/checkpoints/previous.ckpt" in err
    assert (run / "pruned/model.safetensors").read_bytes() == weights
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"last.ckpt.damaged", "previous.ckpt"}


def test_a_pruned_model_is_pruned_again(workspace: Workspace, here: Path, finished: Path) -> None:
    changes: dict[str, Any] = {"model": {"pretrained": str(finished / "pruned")}}
    assert fit(workspace, here, fasppruning={"sparsity": 0.1}, **changes) == 0
    record = json.loads((here / "run/pruned/lit_prune.json").read_text())
    assert [step["base"] for step in record["lineage"]] == [
        workspace.model,
        str(finished / "pruned"),
    ]
    first = json.loads((finished / "report.json").read_text())["models"]["pruned"]
    second = check_report(here / "run", ("dense", "pruned", "recovered"), 0.1)["models"]
    assert second["dense"]["parameters"] == first["parameters"]
    assert "Earlier prunings" in (here / "run/pruned/README.md").read_text()


def test_a_shipped_configuration_by_name(
    workspace: Workspace, here: Path, command: Command
) -> None:
    text = write_text(here.parent / "long", words=120_000)
    done = command(
        *("fit", "--config", "fasp", "--model.pretrained", workspace.model),
        *("--data.train", text, "--data.calibration_share", "0.6", "--trainer.max_steps", "1"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.default_root_dir", "deep/run"),
        cwd=here,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((here / "deep/run/report.json").read_text())
    assert report["method"] == "FASP"
    assert report["protocol"]["window"] == 2048
    assert report["options"]["calibration"] == "128 x 512 tokens"
    assert (here / "deep/run/pruned/model.safetensors").exists()


@pytest.mark.parametrize("command_name", ["validate", "test"])
def test_measuring(
    workspace: Workspace,
    here: Path,
    finished: Path,
    capsys: pytest.CaptureFixture[str],
    command_name: str,
) -> None:
    models = json.loads((finished / "report.json").read_text())["models"]
    config = workspace.config(here.parent / "x.yaml")
    words = len(Path(workspace.text).read_text().split())
    options = ["--data.test", workspace.text] if command_name == "test" else []
    for model, name in ((workspace.model, "dense"), (finished / "pruned", "recovered")):
        given = ["--model.pretrained", str(model), *options]
        assert main([command_name, "--config", config, *given]) == 0
        cells = cells_of(capsys.readouterr().out)
        key = "val/perplexity" if command_name == "validate" else "test/perplexity"
        if command_name == "validate":
            assert cells[key] == f"{models[name]['perplexity']:.5g}"
        assert cells["window"] == "16"
        assert int(cells["tokens"]) == (48 if command_name == "validate" else min(words, 64))
        assert cells["text"] == "text.txt"
    assert list(here.iterdir()) == []


def cells_of(text: str) -> dict[str, str]:
    """Rows of a table of two columns."""
    rows = [line.split("│") for line in text.splitlines() if line.count("│") == 3]
    return {row[1].strip(): row[2].strip() for row in rows}


def test_measuring_a_run_in_the_middle(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = json.loads((finished / "report.json").read_text())["models"]
    config = ["--config", str(finished / "config.yaml"), "--ckpt_path", "last"]
    assert main(["validate", *config]) == 0
    found = float(cells_of(capsys.readouterr().out)["val/perplexity"])
    assert found == pytest.approx(models["recovered"]["perplexity"], rel=1e-3)
    assert list(here.iterdir()) == []


def test_predicting(
    workspace: Workspace, here: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workspace.config(here.parent / "x.yaml")
    given = ["--model.pretrained", str(finished / "pruned")]
    assert main(["predict", "--config", config, *given]) == 0
    assert "int64 [1, 16]" in capsys.readouterr().out
    assert list(here.iterdir()) == []


def test_validate_is_lightnings_own_measure(workspace: Workspace, here: Path) -> None:
    """The same number through the Python interface."""
    module = PrunableLM(workspace.model, dtype="float32")
    data = TextDataModule(workspace.text, window=16, validation_tokens=64, cache_dir=str(here))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    (result,) = trainer.validate(module, data, verbose=False)
    batches = windows(workspace, here, workspace.model)
    assert result["val/perplexity"] == pytest.approx(
        evaluation.perplexity(module.model, batches).value, rel=1e-6
    )


def test_a_value_that_is_not_logged_any_more_is_not_repeated(
    workspace: Workspace, here: Path
) -> None:
    assert fit(workspace, here, fasppruning={"start": 1}, trainer={"max_steps": 3}) == 0
    with (here / "run/logs/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [row for row in rows if row["train/task"]]
    assert [bool(row["train/dense_loss"]) for row in losses] == [True, False, False]
    assert [bool(row["train/recovery_loss"]) for row in losses] == [False, True, True]
