"""The trainer's commands on a stand-in model: folders, shorthands, errors, resumption."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

_HERE = Path(__file__).parent
_BASIC = ["--model.pretrained", "x", "--trainer.accelerator", "cpu", "--trainer.max_steps", "6"]

Run = Callable[..., int]


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(_HERE))
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("standin")


@pytest.fixture
def run(standin: ModuleType) -> Run:
    return lambda *args: standin.main([args[0], *_BASIC, *args[1:]])


def listing(path: Path) -> set[str]:
    """Names of all files and folders; TensorBoard's without time, host and process."""
    names = (str(child.relative_to(path)) for child in path.rglob("*"))
    return {name.partition(".tfevents")[0] for name in names}


def boom(what: str, at_step: int = 0) -> list[str]:
    name = "--trainer.callbacks"
    return [f"{name}+=standin.Boom", f"{name}.what={what}", f"{name}.at_step={at_step}"]


def test_a_fit_fills_the_default_folder(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--data.batch_size", "4", "--stock") == 0
    folder = tmp_path / "lit-prune-run"
    assert {"config.yaml", "checkpoints/last.ckpt", "logs/version_0"} <= listing(folder)
    text = (folder / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert text.startswith("# lit_prune==")
    assert config["data"]["batch_size"] == 4
    assert config["model"]["stock"] is True
    assert config["seed_everything"] == 0
    # what a saved configuration must not do by itself
    assert not {"overwrite", "no_recovery", "stock", "ckpt_path"} & set(config)


def test_the_saved_configuration_runs_again(standin: ModuleType, run: Run, tmp_path: Path) -> None:
    assert run("fit", "--trainer.default_root_dir", "a") == 0
    first = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    options = ["--config", "a/config.yaml", "--trainer.default_root_dir", "b"]
    assert standin.main(["fit", *options]) == 0
    second = torch.load(tmp_path / "b/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert standin.main(["validate", *options]) == 0


def test_a_second_run_is_refused_resumed_or_replaces(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--trainer.default_root_dir", "run"]
    assert run("fit", *folder) == 0
    before = listing(tmp_path)
    capsys.readouterr()
    assert run("fit", *folder) == 2
    assert listing(tmp_path) == before
    assert capsys.readouterr().err.count("\n") == 1

    assert run("fit", *folder, "--ckpt_path", "last", "--trainer.max_steps", "9") == 0
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 9
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 9

    assert run("fit", *folder, "--overwrite") == 0
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("user", 2, "error: expected a calm sea, got a storm; wait"),
        ("wrapped", 2, "error: expected a calm sea, got a storm; wait"),
        ("disk", 2, "error: disk full while writing pruned/model.safetensors"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_an_error_in_a_fit_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], what: str, code: int, words: str
) -> None:
    assert run("fit", "--trainer.default_root_dir", "a/b", *boom(what, at_step=3)) == code
    err = capfd.readouterr().err
    assert err.startswith(f"lit-prune: {words}")
    assert err.count("\n") == 1
    assert listing(tmp_path) == set()


def test_a_bug_shows_its_traceback_and_leaves_nothing(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", *boom("bug")) == 1
    assert capfd.readouterr().err.endswith("ValueError: a bug\n")
    assert listing(tmp_path) == set()


def test_an_error_after_a_checkpoint_keeps_it(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--trainer.max_steps", "80", *boom("user", at_step=60)) == 2
    assert "lit-prune-run/checkpoints/last.ckpt" in listing(tmp_path)
    assert run("fit", "--trainer.max_steps", "80", "--ckpt_path", "last") == 0


def test_a_failed_overwrite_puts_the_old_run_back(run: Run, tmp_path: Path) -> None:
    assert run("fit") == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    before = set(tmp_path.rglob("*"))
    assert run("fit", "--overwrite", *boom("user")) == 2
    assert set(tmp_path.rglob("*")) == before
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_an_error_while_the_model_is_made(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--model.pretrained", "missing") == 2
    assert capsys.readouterr().err == (
        "lit-prune: error: expected a model, got 'missing'; give another\n"
    )
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("options", [["--no-recovery"], ["--trainer.max_steps", "0"]])
def test_no_recovery_leaves_its_callbacks_out(run: Run, tmp_path: Path, options: list[str]) -> None:
    callbacks = [f"--trainer.callbacks+=standin.{name}" for name in ("Recovery", "Export")]
    assert run("fit", *callbacks, *options) == 0
    assert {name for name in listing(tmp_path) if "pruned/" in name} == {
        "lit-prune-run/pruned/model"
    }
    config = yaml.safe_load((tmp_path / "lit-prune-run/config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 0


def test_the_configuration_of_no_recovery_runs_again(
    standin: ModuleType, run: Run, tmp_path: Path
) -> None:
    """Which takes steps before the cut, but none of recovery's."""
    callbacks = [f"--trainer.callbacks+=standin.{name}" for name in ("Recovery", "Cuts", "Export")]
    assert run("fit", *callbacks, "--no-recovery", "--trainer.default_root_dir", "a") == 0
    again = ["--config", "a/config.yaml", "--trainer.default_root_dir", "b"]
    assert standin.main(["fit", *again]) == 0
    for folder in (tmp_path / "a", tmp_path / "b"):
        checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 4
        assert [path.name for path in (folder / "pruned").iterdir()] == ["model"]
        options = yaml.safe_load((folder / "config.yaml").read_text())["trainer"]
        assert options["max_steps"] == 4
        names = [callback["class_path"] for callback in options["callbacks"]]
        assert names == ["standin.Cuts", "standin.Export"]


def test_nothing_is_unpickled_unless_asked_for(run: Run, tmp_path: Path) -> None:
    assert run("fit") == 0
    config = yaml.safe_load((tmp_path / "lit-prune-run/config.yaml").read_text())
    assert config["weights_only"] is True


def test_a_home_is_found_by_every_command(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = ["--trainer.default_root_dir", "~/run"]
    assert run("fit", *folder) == 0
    assert run("fit", *folder, "--ckpt_path", "~/run/checkpoints/last.ckpt") == 0
    assert run("validate", *folder, "--ckpt_path", "last") == 0
    assert run("validate", "--ckpt_path", "~/run/checkpoints/last.ckpt") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_recovery_is_kept_otherwise(run: Run, tmp_path: Path) -> None:
    assert run("fit", "--trainer.callbacks+=standin.Recovery") == 0
    assert "lit-prune-run/pruned/recovery" in listing(tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fit", "--trainer.max_stps", "3"], "did you mean --trainer.max_steps?"),
        (["fit", "--overwrit"], "did you mean --overwrite?"),
        (["validate", "--overwrite"], "got --overwrite"),
        (["fit", "--trainer.max_steps", "three"], "--trainer.max_steps: expected int, got three"),
        (["fit", "--ckpt_path", "none.ckpt"], "got none.ckpt, which does not exist"),
        (["fit", "--ckpt_path", "broken.ckpt"], "got broken.ckpt, which is truncated or no check"),
        (["fit", "--ckpt_path", "other.ckpt"], "got other.ckpt, which is truncated or no check"),
        (["fit", "--ckpt_path", "weights.ckpt"], "weights.ckpt, which is no Lightning checkpoint"),
        (["fit", "--ckpt_path", "best"], "got best, which does not exist: give an existing one"),
        (["validate", "--ckpt_path", "hpc"], "got hpc, which does not exist: give an existing one"),
        (["fit", "--ckpt_path", "https://x.org/y.ckpt"], "got the address https://x.org/y.ckpt"),
        (["validate", "--ckpt_path", "last"], "last.ckpt, which does not exist"),
        (["fit", "--trainer.check_val_every_n_epoch", "0"], "check_val_every_n_epoch above 0, got"),
        (["fit", "--trainer.val_check_interval", "0"], "val_check_interval above 0, got 0"),
        (["fit", "--trainer.val_check_interval", "0.0"], "val_check_interval above 0, got 0"),
        (["fit", "--trainer.logger=standin.Missing"], "to be installed: No module named 'no_such"),
        (["fit", "--trainer.callbacks+=standin.Bom"], "has no attribute 'Bom'"),
        (["fit", "--config", "typo.yaml"], "did you mean trainer.max_steps?"),
        (["fit", "--trainer.accelerator", "gpuu"], "gpuu"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "other.ckpt").write_bytes(b"PK\5\6" + bytes(18))  # an archive, of something else
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.ckpt")
    (tmp_path / "typo.yaml").write_text("trainer:\n  max_stps: 3\n")
    before = listing(tmp_path)
    assert run(*args) == 2
    told, _, err = capfd.readouterr().err.rpartition("lit-prune: error: ")
    assert not told or told.startswith("lit-prune: no callback prunes: name a configuration")
    assert err.count("\n") == 1
    assert words in err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_other_commands_print_a_table_and_write_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(command) == 0
    out = capsys.readouterr().out
    assert ("val/perplexity" if command == "validate" else "float32 [2, 1]") in out
    assert listing(tmp_path) == set()


def test_a_model_without_a_test_is_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("test") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_process_prints_one_line_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, _HERE / "standin.py", "fit", *_BASIC, *boom("user", at_step=3)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_HERE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "lit-prune: error: expected a calm sea, got a storm; wait\n"
    assert listing(tmp_path) == set()
