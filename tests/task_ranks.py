"""A fit with tasks on some processes: `python -m tests.task_ranks FOLDER STRATEGY PROCESSES`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import PrunableLM
from lit_prune.callbacks import FASPPruning, LoRARecovery, RandomState, TaskEvaluation
from lit_prune.fitting.sharding import ShardedStrategy
from tests.tiny_fit import make_data, make_trainer

NAMES = ["piqa", "arc_easy", "winogrande"]
STRATEGIES: dict[str, Any] = {"ddp": DDPStrategy, "fsdp2": ShardedStrategy}


def fit(folder: Path, strategy: str, processes: int) -> dict[str, Any]:
    """Prune and recover `folder/dense`, its tasks in `folder/tasks`; returns what was found."""
    torch.set_num_threads(1)
    module = PrunableLM(str(folder / "dense"), dtype="float32", learning_rate=1e-2)
    callbacks = [
        RandomState(),
        FASPPruning(samples=8, length=16, batch_size=1, start=1),
        LoRARecovery(rank=2),
        TaskEvaluation(NAMES, data=str(folder / "tasks")),
    ]
    kind = STRATEGIES[strategy]
    trainer = make_trainer(
        folder / f"run{processes}",
        callbacks,
        devices=processes,
        strategy=kind(process_group_backend="gloo") if processes > 1 else "auto",
    )
    text = str(folder / "text.txt")
    trainer.fit(module, datamodule=make_data(folder, train=text, batch_size=4 // processes))
    found = module.findings["tasks"]
    (folder / f"found{processes}-{trainer.global_rank}.json").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    fit(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
