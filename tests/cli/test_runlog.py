"""The table of metrics goes on where a resumed fit does."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_prune.cli.runlog import Board, KeepMetrics, RunLog


def trainer(step: int = 0, due: dict[str, float] | None = None) -> Any:
    """In a step whose row is due, or in none."""
    connector = SimpleNamespace(
        _first_loop_iter=None if due is None else False,
        should_update_logs=True,
        metrics={"log": due},
    )
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=step - 1))
    return SimpleNamespace(
        is_global_zero=True, current_epoch=0, fit_loop=loop, _logger_connector=connector
    )


def rows(folder: Path) -> list[str]:
    return (folder / "logs/version_0/metrics.csv").read_text().splitlines()


def log_steps(log: RunLog, *steps: int, key: str = "loss") -> None:
    for step in steps:
        log.log_metrics({"epoch": 0, key: step / 2}, step)


def saved(log: RunLog, step: int, due: dict[str, float] | None = None) -> dict[str, Any]:
    checkpoint: dict[str, Any] = {"global_step": step}
    keep = KeepMetrics(log, Board(Path(log.save_dir)))
    keep.on_save_checkpoint(trainer(step, due), None, checkpoint)  # pyright: ignore
    return checkpoint


def resume(folder: Path, checkpoint: dict[str, Any]) -> RunLog:
    log = RunLog(folder)
    KeepMetrics(log, Board(folder)).on_load_checkpoint(trainer(), None, checkpoint)  # pyright: ignore
    return log


def test_rows_are_written_at_once(tmp_path: Path) -> None:
    log_steps(RunLog(tmp_path), 0, 1)
    assert rows(tmp_path) == ["epoch,loss,step", "0,0.0,0", "0,0.5,1"]


@pytest.mark.parametrize("lost", [None, 0, 2])
def test_a_resumed_log_is_that_of_one_run(tmp_path: Path, lost: int | None) -> None:
    log = RunLog(tmp_path / "whole")
    log.log_metrics({"cut": 1.0}, 0)
    log_steps(log, 0, 1)
    log_steps(log, 2, 3, key="other")
    expected = rows(tmp_path / "whole")

    log = RunLog(tmp_path / "run")
    log.log_metrics({"cut": 1.0}, 0)
    log_steps(log, 0)
    checkpoint = saved(log, step=2, due={"loss": 0.5})  # after the second step, whose row follows
    if lost is not None:  # else killed before that
        log_steps(log, 1)
        log_steps(log, *range(2, 2 + lost), key="other")
    log = resume(tmp_path / "run", checkpoint)
    log_steps(log, 2, 3, key="other")
    assert rows(tmp_path / "run") == expected
    # and again, from a checkpoint whose step is in the file
    checkpoint = saved(log, step=4, due={"other": 1.5})
    log_steps(log, 7)
    resume(tmp_path / "run", checkpoint)
    assert rows(tmp_path / "run") == expected


def test_a_step_that_is_not_logged_has_no_row_to_keep(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log_steps(log, 1)
    checkpoint = saved(log, step=3)
    log.log_metrics({"val": 1.0}, 2)  # comes again
    resume(tmp_path, checkpoint)
    assert rows(tmp_path) == ["epoch,loss,step,val", "0,0.5,1,"]


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log_steps(log, 0)
    checkpoint = saved(log, step=1)
    path = tmp_path / "logs/version_0/metrics.csv"
    path.write_text(path.read_text() + "0,0.2,1")
    log_steps(resume(tmp_path, checkpoint), 1)
    assert rows(tmp_path)[1:] == ["0,0.0,0", "0,0.5,1"]


def test_a_new_folder_and_a_foreign_checkpoint(tmp_path: Path) -> None:
    log = resume(tmp_path / "new", {"global_step": 5, "metrics_rows": 9, "metrics_row": {}})
    log_steps(log, 5)
    assert rows(tmp_path / "new") == ["epoch,loss,step", "0,2.5,5"]
    resume(tmp_path / "new", {"global_step": 5})
    assert len(rows(tmp_path / "new")) == 2


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    for first, resumes in ((0, False), (2, True)):
        board = Board(tmp_path)
        assert board.experiment is None  # Lightning asks before it reads the checkpoint
        if resumes:
            time.sleep(1.1)  # files are read in the order of the seconds in their names
            board.go_on_from(first)
        for step in range(first, 4):
            board.log_metrics({"loss": step / 2 + resumes}, step)
        board.finalize("success")
    events = EventAccumulator(str(tmp_path / "logs/version_0")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 0.0), (1, 0.5), (2, 2.0), (3, 2.5)]
