"""A tiny model, data and callbacks that stand in for the real ones behind the command line.

Run as a script it is the command line on them.
"""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader, TensorDataset

from lit_prune.cli.guard import guarded
from lit_prune.errors import UserError

Raises = Literal["user", "wrapped", "disk", "bug", "interrupt", "exit"]


class Model(LightningModule):
    """A line through a point."""

    def __init__(self, pretrained: str, *, stock: bool = False, rate: float = 0.1) -> None:
        super().__init__()
        if pretrained == "missing":
            raise UserError("expected a model, got 'missing'; give another")
        self.pretrained, self.stock, self.rate = pretrained, stock, rate
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val/perplexity", self.layer(batch[0]).abs().mean())

    def predict_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


class Data(LightningDataModule):
    """Eight points."""

    def __init__(self, train: str = "points", *, batch_size: int = 2) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=self.batch_size)

    val_dataloader = predict_dataloader = train_dataloader


class Boom(Callback):
    """Raises in the middle of a fit."""

    def __init__(self, what: Raises = "user", at_step: int = 0) -> None:
        self.what: Raises = what
        self.at_step = at_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        if trainer.global_step < self.at_step:
            return
        raise_it(self.what)


class Recovery(Callback):
    """Stands for LoRA and distillation."""

    is_recovery = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(trainer.default_root_dir, "pruned").mkdir(parents=True, exist_ok=True)
        Path(trainer.default_root_dir, "pruned", "recovery").touch()


class Cuts(Callback):
    """Stands for what trains before it cuts."""

    last_step = 4


class Export(Callback):
    """Leaves a result."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Path(trainer.default_root_dir, "pruned").mkdir(parents=True, exist_ok=True)
        Path(trainer.default_root_dir, "pruned", "model").touch()


class Missing(Logger):
    """Needs what is not installed."""

    def __init__(self) -> None:
        importlib.import_module("no_such_module")

    @property
    def name(self) -> None:
        """Nothing."""

    @property
    def version(self) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing."""

    def log_hyperparams(self, params: dict[str, object], *args: object, **kwargs: object) -> None:
        """Nothing."""


def raise_it(what: Raises) -> None:
    """Raise what a run can raise."""
    if what == "user":
        raise UserError("expected a calm sea,\n got a storm; wait")
    if what == "wrapped":
        try:
            raise_it("user")
        except UserError as error:
            raise RuntimeError("in a worker") from error
    if what == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "pruned/model.safetensors")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "exit":
        raise SystemExit(3)
    raise ValueError("a bug")


def main(argv: Sequence[str]) -> int:
    """Run the command line on the stand-ins."""

    def action() -> None:
        from lit_prune.cli.main import PruneCLI, quiet

        quiet()
        PruneCLI(Model, Data, list(argv))

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
