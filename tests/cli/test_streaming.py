"""`prune-streaming`: the configuration of a fit, and what a fit's export would hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_prune import load_pruned
from lit_prune.cli.front import main
from tests.cli.conftest import Workspace

pytestmark = pytest.mark.usefixtures("here")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_it_is_what_a_fit_exports(
    workspace: Workspace, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = workspace.config(here / "x.yaml")
    command = ["fit", "--config", config, "--no-recovery", "--trainer.default_root_dir", "run"]
    assert main([*command, "--sparsity", "0.3"]) == 0
    capsys.readouterr()
    asked = ["--config", config, "--sparsity", "0.3", "--out", "deep/out"]
    assert main(["prune-streaming", *asked]) == 0
    ours, theirs = weights(here / "deep/out"), weights(here / "run/pruned")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    out, err = capsys.readouterr()
    assert "of the callbacks only FASPPruning is used" in err
    assert "FASP: layers" in err
    for words in ("channel", "calibrated and pruned in", "peak memory", "stock", "deep/out"):
        assert words in out
    load_pruned(here / "deep/out")
    step = json.loads((here / "deep/out/lit_prune.json").read_text())["lineage"][-1]
    assert step["base_digest"] is None  # the weights are never there together
    # the configuration that the fit has written, with all its options
    assert main(["prune-streaming", "--config", "run/config.yaml", "--out", "again"]) == 0
    again = weights(here / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.items())


def test_a_shipped_configuration_by_name(
    workspace: Workspace,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    options = ["--model.pretrained", workspace.model, "--data.train", workspace.text, "--stock"]
    assert main(["prune-streaming", "--config", "random", *options, "--out", "~/out"]) == 0
    assert not (here / "home/out" / "modeling_lit_pruned.py").exists()
    assert [path.name for path in here.iterdir()] == ["home"]
    assert f'from_pretrained("{here}/home/out"' in capsys.readouterr().out  # as Python finds it


def test_a_single_callback_needs_no_list(workspace: Workspace, here: Path) -> None:
    options = ["--model.pretrained", workspace.model, "--data.train", workspace.text]
    one = "--trainer.callbacks=lit_prune.callbacks.RandomPruning"
    assert main(["prune-streaming", *options, one, "--sparsity", "0.2", "--out", "out"]) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config", "taylor", "--out", "out"], "the scores of Taylor take the whole model"),
        (["--config", "fasp"], "expected --out, got nothing"),
        (["--out", "out"], "expected one pruning callback"),
        (["--sparsity", "0.2", "--out", "out"], "expected one callback that takes a sparsity"),
        (["--config", "fasp", "--out", "here"], "expected a new folder"),
        (["--config", "fasp", "--outt", "x"], "did you mean --out?"),
        (
            ["--config", "fasp", "--out", "out", "--model.pretrained", "no/model"],
            "expected a local folder with safetensors weights, got no/model",
        ),
        (["--config", "fasp", "--out", "out", "--overwrite", "true"], "without overwrite"),
        (["--config", "fasp", "--out", "out", "--no_recovery", "true"], "without no_recovery"),
        (
            ["--config", "fasp", "--out", "out", "--ckpt_path", "last"],
            "expected prune-streaming without ckpt_path, got last",
        ),
    ],
)
def test_mistakes(
    workspace: Workspace,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    words: str,
) -> None:
    (here / "here").mkdir()
    (here / "here" / "file").touch()
    given = ["--model.pretrained", workspace.model, "--data.train", workspace.text]
    assert main(["prune-streaming", *given, *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not (here / "out").exists()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune-streaming", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--out" in text
    assert "--sparsity" in text
    assert "ckpt_path" not in text
