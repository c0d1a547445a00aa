"""Two processes do what one does, for every method."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.method_table import METHODS
from tests.tiny_fit import assert_same, save_model, write_text

#: Masks see other noise on each process.
_NOISY = {"vib", "vib-aligned"}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _start(folder: Path, processes: int, rank: int, port: int) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(processes), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-m", "tests.methods_ranks", str(folder), str(processes)]
    return subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each process ended with: `1-0` alone, `2-0` and `2-1` together."""
    folder, port = tmp_path_factory.mktemp("ranks"), _free_port()
    save_model(folder / "dense")
    write_text(folder)
    started = {f"{n}-{rank}": _start(folder, n, rank, port) for n, rank in ((2, 0), (2, 1), (1, 0))}
    told = {name: process.communicate(timeout=600)[0] for name, process in started.items()}
    for name, process in started.items():
        assert process.returncode == 0, f"{name}: {told[name][-3000:]}"
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in started}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_prune_what_one_does(found: Any, name: str) -> None:
    one, first, second = (found[key].get(name, "not reached") for key in ("1-0", "2-0", "2-1"))
    assert isinstance(first, dict), first
    assert isinstance(second, dict), second
    assert_same(first["layout"], second["layout"])
    assert_same(first["end"], second["end"])
    if name in _NOISY:
        return
    assert first["layout"] == one["layout"]
    torch.testing.assert_close(first["end"], one["end"], rtol=2e-2, atol=2e-3)


def test_processes_that_keep_other_units_are_an_error(found: Any) -> None:
    for key in ("2-0", "2-1"):
        text = found[key]["corrupted"]
        assert text.startswith(
            "expected every process to keep the same units as rank 0, got others"
        )
        assert "on rank 1;" in text
