"""`export`: the checkpoint of a run from its Lightning checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from lit_prune import load_pruned
from lit_prune.cli.front import main
from lit_prune.module import PrunableLM
from tests.cli.conftest import Workspace, snapshot
from tests.tiny_fit import logits

pytestmark = pytest.mark.usefixtures("here")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def copied(run: Path, here: Path) -> Path:
    shutil.copytree(run, here / "run")
    return here / "run"


def fit(workspace: Workspace, here: Path, *args: str, **changes: Any) -> int:
    config = workspace.config(here.parent / "x.yaml", **changes)
    return main(["fit", "--config", config, "--trainer.default_root_dir", "run", *args])


def test_a_finished_run_gives_what_it_gave(
    finished: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished)
    assert main(["export", str(finished), "--out", "pruned"]) == 0
    assert files(here / "pruned") == files(finished / "pruned")
    assert [path.name for path in here.iterdir()] == ["pruned"]
    assert snapshot(finished) == before
    assert 'from_pretrained("pruned", trust_remote_code=True)' in capsys.readouterr().out


def test_a_home_is_found(finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    shutil.copytree(finished, here / "run")
    assert main(["export", "~/run", "--out", "~/pruned"]) == 0
    assert files(here / "pruned") == files(finished / "pruned")
    assert sorted(path.name for path in here.iterdir()) == ["pruned", "run"]


def test_what_a_killed_export_left_is_cleared(finished: Path, here: Path) -> None:
    for name in ("out.tmp-1", "out.old-1"):
        (here / name).mkdir()
        (here / name / "file").touch()
    assert main(["export", str(finished), "--out", "out", "--merge", "false"]) == 0
    assert [path.name for path in here.iterdir()] == ["out"]
    assert sorted(path.name for path in (here / "out").iterdir()) == ["adapter", "base"]


def test_a_stock_run_without_recovery(workspace: Workspace, here: Path) -> None:
    assert fit(workspace, here, "--stock", "--no-recovery") == 0
    assert main(["export", "run", "--out", "deep/in/pruned"]) == 0
    assert files(here / "deep/in/pruned") == files(here / "run/pruned")


def test_bfloat16_is_kept_where_the_trainer_chose_it(workspace: Workspace, here: Path) -> None:
    assert fit(workspace, here, "--trainer.precision", "bf16-true") == 0
    assert main(["export", "run", "--out", "pruned"]) == 0
    weights = load_file(here / "pruned" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert files(here / "pruned") == files(here / "run/pruned")


def merged(checkpoint: dict[str, Any], name: str) -> torch.Tensor:
    """W + alpha / rank * B A of a linear layer."""
    state = checkpoint["state_dict"]
    down, up = (state[f"model.{name}.lora_{letter}.default.weight"] for letter in "AB")
    assert up.abs().max() > 0
    return state[f"model.{name}.base_layer.weight"] + 2.0 * (up @ down)


def test_an_interrupted_run(workspace: Workspace, here: Path) -> None:
    every_step = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"save_last": True, "save_top_k": 0, "every_n_train_steps": 1},
    }
    config = workspace.config(here.parent / "interrupted.yaml")
    content = yaml.safe_load(Path(config).read_text())
    content["trainer"]["max_steps"] = 5
    boom = {
        "class_path": "tests.cli.standin.Boom",
        "init_args": {"what": "interrupt", "at_step": 3},
    }
    content["trainer"]["callbacks"] += [every_step, boom]
    Path(config).write_text(yaml.safe_dump(content))
    run = ["--trainer.default_root_dir", "run"]
    assert main(["fit", "--config", config, *run]) == 130
    assert not (here / "run/pruned").exists()
    assert main(["export", "run", "--out", "pruned"]) == 0

    checkpoint = torch.load(here / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] in (2, 3)
    name = "model.layers.1.mlp.up_proj"
    weights = load_file(here / "pruned/model.safetensors")
    assert torch.equal(weights[f"{name}.weight"], merged(checkpoint, name))
    assert "Not measured." in (here / "pruned/README.md").read_text()

    # a report of an earlier fit in the same folder is not this model's
    assert main(["fit", "--config", config, *run, "--ckpt_path", "last"]) == 130
    assert fit(workspace, here, "--overwrite") == 0
    report = (here / "run/report.json").read_text()
    content["trainer"]["callbacks"][-1]["init_args"]["at_step"] = 5
    Path(config).write_text(yaml.safe_dump(content))
    later = ["--ckpt_path", "last", "--trainer.max_steps", "9"]
    assert main(["fit", "--config", config, *run, *later]) == 130
    (here / "run/report.json").write_text(report)
    # the second ModelCheckpoint leaves the first one's last.ckpt alone
    assert (here / "run/checkpoints/last-v1.ckpt").exists()
    assert main(["export", "run", "--out", "later"]) == 0
    latest = torch.load(here / "run/checkpoints/last-v1.ckpt", weights_only=True)
    assert latest["global_step"] == 4
    exported = load_file(here / "later/model.safetensors")
    assert torch.equal(exported[f"{name}.weight"], merged(latest, name))


def test_adapter_apart(finished: Path, here: Path) -> None:
    assert main(["export", str(finished), "--out", "out", "--merge", "false"]) == 0
    assert sorted(path.name for path in here.iterdir()) == ["out"]
    assert sorted(path.name for path in (here / "out").iterdir()) == ["adapter", "base"]
    base = load_pruned(here / "out/base")
    state = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, weight in base.state_dict().items():
        path, _, kind = f"model.{name}".rpartition(".")
        saved = state.get(f"{path}.{kind}", state.get(f"{path}.base_layer.{kind}"))
        assert torch.equal(weight, saved), name
    both = PeftModel.from_pretrained(base, str(here / "out/adapter"))
    expected = logits(load_pruned(finished / "pruned"))
    assert not torch.allclose(logits(load_pruned(here / "out/base")), expected, atol=1e-4)
    torch.testing.assert_close(logits(both), expected, rtol=1e-4, atol=1e-4)
    settings = json.loads((here / "out/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    card = (here / "out/base/README.md").read_text()
    assert "| pruned | " in card
    assert "Recovery" not in card
    modes = {path.stat().st_mode & 0o777 for path in here.rglob("*") if path.is_file()}
    assert modes == {0o644}


def test_a_broken_checkpoint_is_passed_over(
    finished: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, here)
    last = run / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    whole = run / "checkpoints" / "step=1.ckpt"
    whole.write_bytes(content)
    os.utime(whole, (1e9, 1e9))  # the oldest
    last.write_bytes(content[: len(content) // 2])
    torch.save({"state_dict": {}}, run / "checkpoints" / "other.ckpt")
    (run / "checkpoints" / "empty.ckpt").write_bytes(b"")
    (run / "checkpoints" / ".last.ckpt.tmp7").write_bytes(content)
    capfd.readouterr()
    assert main(["export", "run", "--out", "pruned"]) == 0
    *lines, taken = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("lit-prune: run/checkpoints/last.ckpt is truncated")
    assert [line.split()[1] for line in sorted(lines)] == [
        f"run/checkpoints/{name}.ckpt" for name in ("empty", "last", "other")
    ]
    assert taken == "lit-prune: reading run/checkpoints/step=1.ckpt, after step 2"
    assert files(here / "pruned") == files(run / "pruned")


def refused(*args: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(Path())
    capfd.readouterr()
    assert main(["export", *args]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("lit-prune: error: ")
    assert words in last
    assert snapshot(Path()) == before


def test_what_can_not_be(
    finished: Path, here: Path, workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, here)
    (here / "file").write_text("x")
    (here / "full").mkdir()
    (here / "full" / "file").write_text("x")
    refused("run", "--out", "file", words="got file, which exists", capfd=capfd)
    refused("run", "--out", "full", words="got full, which exists", capfd=capfd)
    refused("run", "--out", "file/out", words="can be written", capfd=capfd)
    refused("full", "--out", "o", words="expected a run's folder", capfd=capfd)
    options = ("run", "--out", "o")
    config = run / "config.yaml"
    text = config.read_text()
    for bad, words in {
        "model: [": "expected the configuration of a run",
        "data: {}": "a section 'model' with 'pretrained'",
        text.replace("  warmup:", "  warmpu:"): "got warmpu",
        text.replace(workspace.model, "./gone"): "at './gone', got nothing there",
        text.replace("code: false", "code: true"): "then pass --trust_remote_code true",
    }.items():
        assert bad != text
        config.write_text(bad)
        refused(*options, words=words, capfd=capfd)
    config.write_text(text.replace(workspace.model, "./gone"))
    assert main(["export", "run", "--out", "moved", "--pretrained", workspace.model]) == 0
    assert files(here / "moved")["model.safetensors"] == files(run / "pruned")["model.safetensors"]
    shutil.rmtree(run / "checkpoints")
    refused(*options, words="expected a whole checkpoint in run/checkpoints", capfd=capfd)


def test_nothing_executable_is_read(
    finished: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, here)
    config = run / "config.yaml"
    config.write_text(f"x: !!python/object/apply:os.mkdir [ran]\n{config.read_text()}")
    refused("run", "--out", "o", words="expected the configuration of a run", capfd=capfd)
    shutil.copy(finished / "config.yaml", config)
    torch.save({"lit_prune": Path("x"), "state_dict": {}}, run / "checkpoints" / "last.ckpt")
    refused("run", "--out", "o", words="expected a whole checkpoint", capfd=capfd)


def test_before_the_cut(
    workspace: Workspace, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    without = ["FASPPruning", "LoRARecovery", "Distillation", "ExportCheckpoint"]
    assert fit(workspace, here, without=without) == 0
    refused("run", "--out", "o", words="stopped before the cut; go on with", capfd=capfd)
    shutil.rmtree(here / "run")
    assert fit(workspace, here, "--no-recovery") == 0
    options = ("run", "--out", "o", "--merge", "false")
    refused(*options, words="expected a run with an adapter for --merge false", capfd=capfd)


def test_a_failed_export_leaves_nothing(
    finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PrunableLM, "export", full)
    assert main(["export", str(finished), "--out", "out", "--merge", "false"]) == 2
    assert list(here.iterdir()) == []
