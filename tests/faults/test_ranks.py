"""Faults on one of two processes: the other neither waits for ever nor does something else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_fit import write_text


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process ended with."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).resolve().parents[2]
    write_text(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    environment = {**os.environ, **both, "PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fault_ranks", str(folder)],
            cwd=root,
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    return [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in range(2)]


def test_memory_that_runs_out_on_one(found: list[dict[str, Any]]) -> None:
    plain, crowded = ([own[crowd] for own in found] for crowd in ("False", "True"))
    assert not any("warnings" in own["history"][0] for own in plain)
    for own in crowded:
        (text,) = own["history"][0]["warnings"]
        assert text.startswith("process 1: memory ran out with 2 calibration windows of 16 tokens")
        assert own["layout"] == plain[0]["layout"]
        for name, value in own["weights"].items():
            assert torch.equal(value, crowded[0]["weights"][name]), name
            assert torch.allclose(value, plain[0]["weights"][name], rtol=1e-3, atol=2e-4), name
    assert [len(own["failures"]) > 0 for own in crowded] == [False, True]


def test_a_loss_that_is_no_number_on_one(found: list[dict[str, Any]]) -> None:
    first, second = (own["nan"] for own in found)
    assert "got NaN or infinity in another process in step 3 (recovery)" in first
    assert "got nan in step 3 (recovery)" in second
