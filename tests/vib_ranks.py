"""Mask training on two processes: `python vib_ranks.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import PrunableLM
from lit_prune.callbacks.vib import VIBPruning
from tests.tiny_fit import make_data, make_trainer, parameters


class Masks(Callback):
    """Notes the masks and the noise's seeds after each batch; listed before the pruning."""

    def __init__(self) -> None:
        self.mu: list[torch.Tensor] = []
        self.seeds: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kw: Any) -> None:
        if pl_module.gates is not None:
            self.mu.append(pl_module.gates.mu.detach().clone())
            self.seeds.append(pl_module.gates.noise_seed(0))


def fit(folder: Path, processes: int) -> dict[str, Any]:
    """Train masks for four steps, cut, and train for one."""
    torch.set_num_threads(1)
    module = PrunableLM(str(folder / "dense"), dtype="float32", learning_rate=1e-2)
    small: Any = {"samples": 4, "length": 16, "batch_size": 1}
    masks, vib = Masks(), VIBPruning(0.3, steps=4, rate=0.5, multiple=0, keep_best=False, **small)
    strategy: Any = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    trainer = make_trainer(
        folder / f"run{processes}", [masks, vib], 5, devices=processes, strategy=strategy
    )
    data = make_data(folder, train=str(folder / "text.txt"), batch_size=4 // processes)
    trainer.fit(module, datamodule=data)
    return {
        "mu": masks.mu,
        "seeds": masks.seeds,
        "layout": module.layout.to_dict(),
        "parameters": parameters(module.model),
        "rank": trainer.global_rank,
    }


if __name__ == "__main__":
    result = fit(Path(sys.argv[1]), 2)
    torch.save(result, Path(sys.argv[1]) / f"rank{result['rank']}.pt")
