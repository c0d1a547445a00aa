"""A tiny model, a text and a configuration on the disk, made once, for the real command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.utils.logging import disable_progress_bar

from lit_prune.cli.front import main
from tests.tiny_fit import save_model, write_text

#: What a fit may say before it ends with an error.
PROGRESS = ("perplexity of the ", "FASP: ")


@dataclass(frozen=True)
class Workspace:
    """Inputs of a run.

    Attributes:
        folder: Where they lie.
        model: A tiny llama with its tokenizer.
        text: Some windows of text.
    """

    folder: Path
    model: str
    text: str

    def config(self, path: Path, **changes: Any) -> str:
        """Write a configuration; a change names a section or, in lower case, a callback."""
        callbacks: dict[str, dict[str, Any]] = {
            "RandomState": {},
            "FASPPruning": {"sparsity": 0.2, "samples": 8, "length": 8},
            "LoRARecovery": {"rank": 2, "alpha": 4},
            "Distillation": {},
            "GainLossReport": {"rounds": 1, "length": 8},
            "ExportCheckpoint": {},
        }
        for name in callbacks:
            callbacks[name] |= changes.get(name.lower(), {})
        left_out = changes.get("without", ())
        model = {"pretrained": self.model, "dtype": "float32", "learning_rate": 1e-2}
        data = {
            "train": self.text,
            "length": 8,
            "batch_size": 2,
            "window": 16,
            "validation_tokens": 64,
        }
        trainer = {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": f"lit_prune.callbacks.{name}", "init_args": arguments}
                for name, arguments in callbacks.items()
                if name not in left_out
            ],
        }
        sections = {"model": model, "data": data, "trainer": trainer}
        content = {name: {**part, **changes.get(name, {})} for name, part in sections.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return str(path)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    disable_progress_bar()  # as the command has it without a terminal, if it is imported first
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Everything that a run reads."""
    folder = tmp_path_factory.mktemp("workspace")
    return Workspace(folder, save_model(folder / "model"), write_text(folder))


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs `python -m lit_prune`, or other arguments of python, in a process of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*args: str, cwd: Path, python: bool = False, **options: Any) -> Any:
        root = str(Path(__file__).parents[2])
        environment = {
            **os.environ,
            "PYTHONPATH": "" if python else root,
            "XDG_CACHE_HOME": str(cache),
            "OMP_NUM_THREADS": "1",
        }
        start = [sys.executable] if python else [sys.executable, "-m", "lit_prune"]
        return subprocess.run(
            [*start, *args], cwd=cwd, env=environment, capture_output=True, text=True, **options
        )

    return run


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder: its size and when it was changed."""
    return {
        str(path.relative_to(folder)): (path.is_dir(), path.is_file() and path.stat().st_size)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def finished(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing may change: one layer whole, so that it is not stock."""
    folder = tmp_path_factory.mktemp("finished")
    torch.set_num_threads(1)
    config = workspace.config(folder / "x.yaml", fasppruning={"protected_layers": [1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run = str(folder / "run")
        assert main(["fit", "--config", config, "--trainer.default_root_dir", run]) == 0
    return folder / "run"
