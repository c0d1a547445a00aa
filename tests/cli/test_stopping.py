"""SIGTERM: a checkpoint after the step, a code of its own, and a resume to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from lit_prune.cli.front import main
from tests.cli.conftest import Workspace

_ROOT = Path(__file__).parents[2]


class TermAt(Callback):
    """Sends SIGTERM to its own process, once.

    Args:
        where: The hook.
        step: Steps done before it.
        rank: The process.
    """

    def __init__(self, where: str, step: int = 0, rank: int = 0) -> None:
        self.where, self.step, self.rank = where, step, rank

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        self._send("calibration", trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        self._send("step", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._send("train end", trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._send("fit end", trainer)

    def _send(self, where: str, trainer: Trainer) -> None:
        here = where == self.where and trainer.global_rank == self.rank
        if here and trainer.global_step == self.step:
            self.where = ""
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def configure(workspace: Workspace, path: Path, **options: Any) -> str:
    """A configuration of four steps, with a `TermAt` in front if options are given."""
    trainer = {"max_steps": 4, **options.pop("trainer", {})}
    text = Path(workspace.config(path, trainer=trainer, gainlossreport={"rounds": 0})).read_text()
    content = yaml.safe_load(text)
    if options:
        entry = {"class_path": "tests.cli.test_stopping.TermAt", "init_args": options}
        content["trainer"]["callbacks"].insert(0, entry)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(path)


def fit(config: str, folder: str, *args: str) -> int:
    return main(["fit", "--config", config, "--trainer.default_root_dir", folder, *args])


def assert_equal_results(one: Path, other: Path) -> None:
    for name in ("pruned/model.safetensors", "pruned/config.json", "logs/version_0/metrics.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def steps_of(folder: Path) -> int:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def _drop_last_row(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_in_training(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str], accumulated: int
) -> None:
    trainer = {"accumulate_grad_batches": accumulated}
    plain = configure(workspace, tmp_path / "plain.yaml", trainer=trainer)
    assert fit(plain, "whole") == 0
    for step in (0, 1, 3):
        folder = tmp_path / f"run{step}"
        stopped = configure(
            workspace, tmp_path / "x.yaml", where="step", step=step, trainer=trainer
        )
        capfd.readouterr()
        assert fit(stopped, folder.name) == 143
        err = capfd.readouterr().err
        assert err.endswith("terminated; an interrupted run goes on with --ckpt_path last\n")
        assert "Traceback" not in err
        assert steps_of(folder) == step + 1
        assert not (folder / "report.json").exists()
        if step == 1:  # killed before the saved step was logged
            _drop_last_row(folder / "logs/version_0/metrics.csv")
        assert fit(plain, folder.name, "--ckpt_path", "last") == 0
        assert_equal_results(folder, tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_before_and_after_training(workspace: Workspace, tmp_path: Path) -> None:
    plain = configure(workspace, tmp_path / "plain.yaml")
    assert fit(plain, "whole") == 0
    for where, step in (("calibration", 0), ("train end", 4), ("fit end", 4)):
        folder = tmp_path / where
        config = configure(workspace, tmp_path / "x.yaml", where=where, step=step)
        assert fit(config, where) == 143
        if step:
            assert steps_of(folder) == 4
            assert not (folder / "pruned").exists()
        else:
            assert not folder.exists()
        assert fit(plain, where, "--ckpt_path", "last") == 0
        assert_equal_results(folder, tmp_path / "whole")


def test_without_checkpoints(workspace: Workspace, tmp_path: Path) -> None:
    trainer = {"enable_checkpointing": False}
    config = configure(workspace, tmp_path / "x.yaml", where="step", step=1, trainer=trainer)
    assert fit(config, "run") == 143
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes(workspace: Workspace, tmp_path: Path) -> None:
    """One of two is told to stop, before training or in it, and both do."""
    ddp = {"strategy": "ddp", "devices": 2}

    def run(config: str, folder: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "lit_prune", "fit", "--config", config]
        command += ["--trainer.default_root_dir", folder, "--ckpt_path", "last"]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stderr

    plain = configure(workspace, tmp_path / "plain.yaml", trainer=ddp)
    assert run(plain, "whole")[0] == 0
    for where, step, rank in (("step", 1, 1), ("calibration", 0, 0)):
        options: dict[str, Any] = {"where": where, "step": step, "rank": rank}
        config = configure(workspace, tmp_path / "x.yaml", trainer=ddp, **options)
        code, err = run(config, "run")
        assert code == 143, err
        assert err.count("lit-prune: terminated") == 1
        assert "Traceback" not in err
        if where == "step":
            assert steps_of(tmp_path / "run") == 2
            assert run(plain, "run")[0] == 0
            assert_equal_results(tmp_path / "run", tmp_path / "whole")
            (tmp_path / "run").rename(tmp_path / "done")
        else:
            assert not (tmp_path / "run").exists()
