"""A whole fit on some processes: `python two_ranks.py FOLDER PROCESSES`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import PrunableLM
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
    RandomState,
)
from tests.tiny_fit import Watch, make_data, make_trainer


def fit(folder: Path, processes: int) -> None:
    """Prune `folder/dense`, recover it, and save what each process ended with."""
    torch.set_num_threads(1)
    dense, module = (
        PrunableLM(str(folder / "dense"), dtype="float32", learning_rate=1e-2) for _ in range(2)
    )
    watch = Watch()
    callbacks = [RandomState(), FASPPruning(samples=8, length=16, batch_size=1)]
    callbacks += [LoRARecovery(rank=2), Distillation(), GainLossReport(rounds=1, length=8)]
    callbacks += [ExportCheckpoint(), watch]
    strategy: Any = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer = make_trainer(
        folder / f"run{processes}",
        callbacks,
        devices=processes,
        strategy=strategy,
        limit_val_batches=None,
        val_check_interval=1,
    )
    # three windows to measure on: one process has one more than the other
    text = str(folder / "text.txt")
    data = make_data(folder, train=text, batch_size=4 // processes, validation_tokens=48)
    (before,) = trainer.validate(dense, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    result = {"end": watch.end, "layout": module.layout.to_dict(), "logits": watch.logits}
    result["before"], result["after"] = (
        float(found["val/perplexity"]) for found in (before, trainer.callback_metrics)
    )
    torch.save(result, folder / f"end{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    fit(Path(sys.argv[1]), int(sys.argv[2]))
