"""Fits under ddp and under fsdp2 on two processes: `python -m tests.sharded_fit FOLDER`.

The processes are started from outside, so that one pair runs all fits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.tensor import DTensor

from lit_prune import PrunableLM
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomState,
)
from tests.method_table import METHODS
from tests.own_project import OwnData, OwnModule
from tests.tiny_fit import make_data, make_trainer, parameters

#: Module, data module, what prunes and recovers, and the trainer's options.
Parts = tuple[Any, Any, list[Callback], dict[str, Any]]

_LATE: dict[str, Any] = {"samples": 4, "batch_size": 1, "length": 16, "start": 2}


class Shares(Callback):
    """Notes what a process holds of the language model's parameters before each step."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        held = whole = 0
        for parameter in pl_module.model.parameters():
            whole += parameter.numel()
            local: Any = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held += local.numel()
        self.shares.append(held / whole)


class VectorModule(OwnModule):
    """Has a temperature for each token."""

    def configure_model(self) -> None:
        """Load the model, once."""
        made = self.model is None
        super().configure_model()
        if made:
            number = self.net.lm.config.vocab_size
            self.net.temperature = nn.Parameter(torch.full((number,), 1.5))


def _recovery() -> list[Callback]:
    return [LoRARecovery(rank=2), Distillation()]


def _one_shot(folder: Path) -> Parts:
    module = PrunableLM(str(folder / "dense"), learning_rate=1e-2)
    pruning = METHODS["fasp"].make(samples=6, batch_size=1)
    return module, _data(folder), [pruning, *_recovery()], {"max_steps": 3}


def _iterative(folder: Path) -> Parts:
    """All weights of a model with tied embeddings, cut twice in training, measured within it."""
    module = PrunableLM(
        str(folder / "tied"), dtype="float32", learning_rate=1e-2, gradient_checkpointing=True
    )
    pruning = FASPPruning(iterations=2, every=2, **_LATE)
    options = {"max_steps": 6, "limit_val_batches": None, "val_check_interval": 3}
    return module, _data(folder), [pruning, Distillation()], options


def _masks(folder: Path) -> Parts:
    """Masks that train beside the model; one process has more windows to compare them on."""
    module = PrunableLM(str(folder / "dense"), dtype="float32", learning_rate=1e-2)
    pruning = METHODS["vib"].make(samples=5, batch_size=1)
    return module, _data(folder), [pruning, *_recovery()], {"max_steps": 7}


def _own(folder: Path) -> Parts:
    """A module with a vector of its own beside the model, and momentum."""
    pruning = FASPPruning(**{**_LATE, "length": 10})
    options = {"max_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    return VectorModule(str(folder / "dense")), OwnData(), [pruning], options


def _own_by_value(folder: Path) -> Parts:
    """The same with gradients that are clipped one by one."""
    module, data, steps, options = _own(folder)
    options |= {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    return module, data, steps, options


#: Fits that go on under fsdp2 from a checkpoint, before and after cuts.
RESUMED = (("one-shot", "ddp", 2), ("iterative", "fsdp2", 3), ("masks", "fsdp2", 2))
FITS = {
    "one-shot": _one_shot,
    "iterative": _iterative,
    "masks": _masks,
    "own": _own,
    "own-by-value": _own_by_value,
}


def _data(folder: Path) -> Any:
    # three windows to measure on: one process has one more than the other
    text = str(folder / "text.txt")
    return make_data(folder, train=text, batch_size=2, validation_tokens=48)


def fit(folder: Path, name: str, strategy: str, run: str, resume: str | None = None) -> Any:
    """A fit with a checkpoint after each step, and what it ended with."""
    seed_everything(0, verbose=False)
    module, data, steps, options = FITS[name](folder)
    shares = Shares()
    saver = ModelCheckpoint(folder / run, "{step}", every_n_train_steps=1, save_top_k=-1)
    every = [RandomState(), *steps, shares, GainLossReport(rounds=0), ExportCheckpoint(), saver]
    trainer = make_trainer(
        folder / run, every, devices=2, strategy=strategy, enable_checkpointing=True, **options
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return {
        "layout": module.layout.to_dict(),
        "end": parameters(module),
        "left": left_on(module),
        "shares": shares.shares,
        "measured": float(trainer.callback_metrics.get("val/perplexity", 0.0)),
    }


def left_on(module: Any) -> list[Any]:
    """The modules' classes, and the names and numbers of what they hold."""
    return [
        [
            type(part).__name__,
            sorted(
                (key, len(value)) for key, value in vars(part).items() if isinstance(value, dict)
            ),
        ]
        for part in module.model.modules()
    ]


def main(folder: Path) -> None:
    """Run everything on this process and the other one."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in FITS:
        for strategy in ("ddp", "fsdp2"):
            found[f"{name} {strategy}"] = fit(folder, name, strategy, f"{name}-{strategy}")
    for name, made_by, step in RESUMED:
        path = str(folder / f"{name}-{made_by}" / f"step={step}.ckpt")
        found[f"{name} resumed"] = fit(folder, name, "fsdp2", f"{name}-resumed", path)
    torch.save(found, folder / f"{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
