"""Whatever a command raises becomes one line and a code, or a traceback for a bug."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from lit_prune.cli import guard
from lit_prune.cli.guard import guarded, is_rank_zero, termination
from lit_prune.errors import UserError


class MisconfigurationException(Exception):
    """Has the name of Lightning's."""


class SIGTERMException(SystemExit):
    """Has the name of Lightning's."""


def end(*errors: BaseException) -> int:
    """Raise errors, each caused by the next."""

    def action() -> None:
        cause = None
        for error in reversed(errors):
            error.__cause__ = cause
            cause = error
        if errors:
            raise errors[0]

    return guarded(action)


@pytest.mark.parametrize(
    ("errors", "line"),
    [
        ([UserError("expected a,\n got b; do c")], "error: expected a, got b; do c"),
        ([RuntimeError("outer"), UserError("inner")], "error: inner"),
        ([MisconfigurationException("no such\ndevice")], "error: no such device"),
        (
            [OSError(errno.ENOSPC, "No space left on device", "x.ckpt")],
            "error: disk full while writing x.ckpt: free some space or choose another "
            "--trainer.default_root_dir",
        ),
        (
            [OSError(errno.EFBIG, "File too large", "x")],
            "error: file too large while writing x: free some space or choose another "
            "--trainer.default_root_dir",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    errors: list[BaseException], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(*errors) == 2
    assert capsys.readouterr().err == f"lit-prune: {line}\n"


def test_a_writer_that_hands_on_text_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(RuntimeError("Io: No space left on device (os error 28)")) == 2
    err = capsys.readouterr().err
    assert err.startswith("lit-prune: error: disk full while writing (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("Unable to allocate 8. GiB"),
    ],
)
def test_no_memory_is_one_line(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(error) == 2
    err = capsys.readouterr().err
    assert err.startswith("lit-prune: error: out of memory (")
    assert err.endswith("set --model.gradient_checkpointing true\n")
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(ValueError("a bug")) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ValueError: a bug\n")


def test_a_bug_while_a_user_error_was_handled_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> None:
        try:
            raise UserError("expected a, got b")
        except UserError:
            _ = 1 / 0

    assert guarded(action) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_codes_without_an_error() -> None:
    assert end() == 0
    assert end(SystemExit(0)) == 0
    assert end(SystemExit()) == 0
    assert end(SystemExit(3)) == 3
    assert end(SIGTERMException()) == 143


def test_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    def lightning() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    assert end(KeyboardInterrupt()) == 130
    assert guarded(lightning) == 130
    assert capsys.readouterr().err.count("\n") == 2


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("rank", "code"), [("0", 143), ("1", 0)])
def test_termination(
    rank: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    done: list[int] = []

    def action() -> None:
        terminate()
        done.append(1)

    for _ in range(2):
        assert guarded(action, resumes=True) == code
    assert done == []
    assert capsys.readouterr().err.count("lit-prune: terminated;") == (2 if rank == "0" else 0)
    assert guarded(action) == code  # of a command that has nothing to go on from
    assert "ckpt_path" not in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_termination_waits_while_it_is_deferred() -> None:
    done: list[bool] = []

    def action() -> None:
        termination.deferred = True
        terminate()
        done.append(termination.asked)

    assert guarded(action) == 0
    assert done == [True]
    assert guarded(lambda: done.append(termination.asked)) == 0
    assert done == [True, False]


@pytest.mark.parametrize(("processes", "code"), [("1", 1), ("2", 143)])
def test_a_connection_lost_in_termination(
    processes: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", processes)

    def action() -> None:
        termination.deferred = True
        terminate()
        raise RuntimeError("Connection closed by peer")

    assert guarded(action) == code


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "2"}, False),
    ],
)
def test_first_rank(env: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert is_rank_zero() is expected


def test_another_rank_speaks_only_if_its_launcher_lives_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(guard, "_PATIENCE", 0.1)
    assert end(UserError("expected a, got b")) == 2
    assert capsys.readouterr().err == "lit-prune: error: expected a, got b\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("UserError('twice')", ""),
        ("RuntimeError('pair.cc:534] Connection closed by peer [127.0.0.1]:1')", ""),
        ("ValueError('of its own')", "ValueError: of its own\n"),
    ],
)
def test_another_rank_is_silent_when_its_launcher_failed_too(error: str, told: str) -> None:
    child = (
        "import os, time\n"
        "from lit_prune.cli.guard import guarded\n"
        "from lit_prune.errors import UserError\n"
        "def action():\n"
        f"    raise {error}\n"
        "raise SystemExit(guarded(action))\n"
    )
    parent = (
        "import subprocess, sys, os\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env=dict(os.environ, RANK='1'))\n"
        "import time; time.sleep(0.3)\n"
    )
    # communicate() returns when the orphaned child has closed the pipe too
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.stderr.endswith(told)
    assert bool(done.stderr) is bool(told)


def test_a_lost_connection_is_told_where_no_other_process_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guard, "_PATIENCE", 0.1)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert end(RuntimeError("Connection closed by peer")) == 1
        assert capsys.readouterr().err.endswith("Connection closed by peer\n")


def test_a_reader_that_has_enough_is_no_error() -> None:
    """As with `lit-prune inspect MODEL --json | head`."""
    code = (
        "import sys; from lit_prune.cli.guard import guarded\n"
        "sys.exit(guarded(lambda: [print('line ' * 100) for _ in range(2000)]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
