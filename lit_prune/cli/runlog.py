"""The metrics of a run, as a table and for TensorBoard, which go on where a resumed fit does."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_prune.cli.saving import atomic_write


class _Table(ExperimentWriter):
    """Lightning's writer, but it appends to the file that is there."""

    rows = 0

    def _check_log_dir_exists(self) -> None:
        """Go on with the columns and rows that are there; Lightning deletes them."""
        header, rows = self._read()
        self.metrics_keys, self.rows = header, len(rows)

    def save(self) -> None:
        """Append what is new."""
        added = len(self.metrics)
        super().save()
        self.rows += added

    def cut_back(self, rows: int, last: Mapping[str, Any]) -> None:
        """Drop what was logged after a checkpoint.

        Args:
            rows: Rows that were there when it was made.
            last: The row that was due right after it, or nothing.
        """
        header, found = self._read()
        kept = found[:rows]
        if header:
            self._write([header, *kept])
        self.rows = len(kept)
        cells = {key: str(value) for key, value in last.items()}
        logged = [dict(zip(header, row, strict=True)) for row in kept]
        if cells and not any({k: v for k, v in row.items() if v} == cells for row in logged):
            self.metrics.append(dict(last))
            self.save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns, at once."""
        header, rows = self._read()
        cells = [dict(zip(header, row, strict=True)) for row in rows]
        self._write([fieldnames, *([row.get(key, "") for key in fieldnames] for row in cells)])

    def _read(self) -> tuple[list[str], list[list[str]]]:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return [], []
        text = path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()  # a kill may cut the last one off
        header, *rows = [*csv.reader(lines)] or [[]]
        return header, rows

    def _write(self, rows: list[list[str]]) -> None:
        path = Path(self.metrics_file_path)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())


class RunLog(CSVLogger):
    """`logs/version_0/metrics.csv` in a run's folder, each row written when it is logged.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="logs", version=0, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The table, opened when it is first asked for."""
        if self._experiment is None:
            self._experiment = _Table(log_dir=self.log_dir)
        return self._experiment


class Board(TensorBoardLogger):
    """The same for TensorBoard, beside the table.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="logs", version=0)
        self._begun = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, opened by what is logged; Lightning asks before it reads a checkpoint."""
        return super().experiment if self._begun else None

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write values of a step."""
        self._begun = True
        super().log_metrics(metrics, step)

    def save(self) -> None:
        """Flush the writer, if there is one."""
        if self._begun:
            super().save()

    def finalize(self, status: str) -> None:
        """Close the writer, if there is one."""
        if self._begun:
            super().finalize(status)

    def go_on_from(self, step: int) -> None:
        """Have TensorBoard hide what was logged at this step and after it."""
        self._kwargs["purge_step"] = step

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Leave them to the table, which lies in the same folder."""


class KeepMetrics(Callback):
    """Cuts logs back to the checkpoint that a fit goes on from.

    Args:
        log: The table.
        board: The log for TensorBoard.
    """

    def __init__(self, log: RunLog, board: Board) -> None:
        self.log_of_run, self.board = log, board

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Forget the last step's values.

        Lightning logs them again where a key is not logged any more, as after a cut, which a
        resumed fit can't do.
        """
        for metric in cast(Any, trainer)._results.values():
            if metric.is_tensor and not metric.meta.on_epoch:
                metric.reset()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note how many rows there are."""
        if trainer.is_global_zero:
            self.log_of_run.save()
            checkpoint["metrics_rows"] = self.log_of_run.experiment.rows
            checkpoint["metrics_row"] = _due(trainer)

    @rank_zero_only
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Drop the rows that will come again.

        The saved step's own row is logged after the checkpoint is written: it won't come again,
        and a kill in between has kept it from the file.
        """
        if "metrics_rows" not in checkpoint:  # not made by this command
            return
        self.board.go_on_from(checkpoint["global_step"])
        rows, last = checkpoint["metrics_rows"], checkpoint["metrics_row"]
        self.log_of_run.experiment.cut_back(rows, last)


def _due(trainer: Trainer) -> dict[str, Any]:
    """The row of the present step, which Lightning logs after the callbacks' hooks."""
    connector = cast(Any, trainer)._logger_connector
    if connector._first_loop_iter is None or not connector.should_update_logs:
        return {}  # not in a step, or in one that is not logged
    values = convert_tensors_to_scalars(connector.metrics["log"])
    step = values.pop("step", trainer.fit_loop.epoch_loop._batches_that_stepped)
    return {"epoch": trainer.current_epoch, **values, "step": int(step)} if values else {}
