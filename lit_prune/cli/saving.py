"""What the command line writes into a run's folder: the configuration and Lightning checkpoints."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from lit_prune.cli.checkpoints import LAST, PREVIOUS
from lit_prune.cli.stopping import StopWhenTerminated
from lit_prune.errors import UserError

# Shorthands of the command line: what they did is in the other keys, and a configuration that
# overwrites or resumes by itself would be a trap.
COMMAND_LINE_ONLY = ("overwrite", "no_recovery", "stock", "sparsity", "ckpt_path")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when all of it is written.

    Args:
        path: Where the file goes; its folder exists.
        previous: Where a file that is there goes, instead of being replaced.

    Yields:
        The open file.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say where
        raise


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`, with the last step in it, and the one before it.

    The stock callback saves at the end of training only if it never saved before.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save unless the last step is saved already."""
        if trainer.global_step != self._last_global_step_saved:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class RunConfigCallback(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder when a fit starts.

    The stock callback aborts where the file exists, which it does on every resume. This one refuses
    to go on from a checkpoint without the callback that cuts, or on some processes only.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Namespace,
        config_filename: str = "config.yaml",
        overwrite: bool = True,
        multifile: bool = False,
        save_to_log_dir: bool = False,
    ) -> None:
        super().__init__(parser, config, config_filename, overwrite, multifile, save_to_log_dir)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, in a fit only.

        Raises:
            UserError: Processes start from different checkpoints.
        """
        if stage == "fit":
            # the trainer learns of its own path after this
            _require_same_start(self.config.ckpt_path, trainer.world_size)
            if self.config.ckpt_path is None:
                super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file of a resumed fit, now that its checkpoint was not refused."""
        super().setup(trainer, pl_module, "fit")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Miss callbacks that prune; Lightning leaves out silently what a run does not list.

        Raises:
            UserError: The checkpoint was made with one that this run does not have.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        listed = {callback.state_key for callback in cast(Any, trainer).callbacks}
        for key, state in checkpoint["callbacks"].items():
            if key not in listed and "made_with" in state:
                raise UserError(
                    f"expected the callback that the checkpoint was made with, {key}, among "
                    "trainer.callbacks, got none; go on with the run's own config.yaml, or start "
                    "anew with --overwrite"
                )

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file; Lightning calls this on the first rank only."""
        config = self.config.clone()
        for key in COMMAND_LINE_ONLY:
            config.pop(key, None)
        text = self.parser.dump(config, skip_none=False, skip_validation=True)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / self.config_filename) as file:
            file.write(text.encode())


def _require_same_start(path: str | None, processes: int) -> None:
    """Compare the checkpoints' names; their folders may be mounted under different ones."""
    if processes == 1:
        return
    found: list[Any] = [None] * processes
    dist.all_gather_object(found, None if path is None else Path(path).name)
    if len(set(found)) > 1:
        told = ", ".join(f"{name or 'none'} on rank {rank}" for rank, name in enumerate(found))
        raise UserError(
            f"expected all processes to start from the same checkpoint, got {told}: give "
            "--trainer.default_root_dir a folder that all nodes share"
        )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there.

    Lightning's own goes through the system's temporary folder: from another file system the move is
    a copy, and a kill leaves a truncated `last.ckpt`, which nothing can resume from.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What to save.
            path: Where; an address that is no local path is left to Lightning.
            storage_options: Refused by Lightning.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Through memory: torch.save aborts the process when its file fails under it.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        previous = target.with_name(PREVIOUS) if target.name == LAST else None
        with atomic_write(target, previous) as file:
            file.write(buffer.getbuffer())


class UntrainedCheckpoint(Callback):
    """Writes `last.ckpt` in a fit of no steps, in which Lightning would write none.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, unless the fit resumed from a trained one."""
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.folder / LAST)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out optimizers that never stepped: a fit that goes on has its own, of adapters."""
        if trainer.global_step == 0:
            checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []


def add_checkpoints(config: dict[str, Any], folder: Path) -> None:
    """Save now and then, at the end and on SIGTERM, unless the trainer shall not save.

    Args:
        config: The trainer's arguments; its list of callbacks gets more.
        folder: Where checkpoints go that name no folder.
    """
    saves, callbacks = config.get("enable_checkpointing") is not False, config["callbacks"]
    if saves:
        _place_checkpoints(callbacks, folder)
        if config.get("max_steps") == 0:  # first in the list: before anything is merged
            callbacks.insert(0, UntrainedCheckpoint(folder))
    callbacks.append(StopWhenTerminated(folder / LAST if saves else None))


def _place_checkpoints(callbacks: list[Callback], folder: Path) -> None:
    """Send checkpoints that name no folder to the run's, and make some if none are asked for."""
    found = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in found:
        if callback.dirpath is None:
            callback.dirpath = str(folder.resolve())
    if not found:
        callbacks.append(
            LastCheckpoint(
                folder,
                save_last=True,
                save_top_k=0,
                every_n_train_steps=50,
                enable_version_counter=False,
            )
        )
