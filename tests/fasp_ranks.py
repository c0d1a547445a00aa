"""FASP in a fit of no steps, on one process or two: `python fasp_ranks.py FOLDER BATCHES`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lit_prune import PrunableLM
from lit_prune.callbacks import FASPPruning
from tests.structure.tiny import tiny_model

Batch = dict[str, Tensor]


class Windows(LightningDataModule):
    """Random calibration windows, padded on the right where a row is short."""

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        self.rows = rows
        self.asked: list[tuple[int, ...]] = []

    def calibration_batches(
        self, samples: int, length: int, batch_size: int, turn: int = 0
    ) -> list[Batch]:
        self.asked.append((samples, length, batch_size))
        generator = torch.Generator().manual_seed(5 + turn)
        ids = torch.randint(3, 61, (samples, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        rows = zip(ids.split(batch_size), mask.split(batch_size), strict=True)
        return [{"input_ids": x, "attention_mask": m} for x, m in rows]

    def train_dataloader(self) -> Any:
        (batch,) = self.calibration_batches(2, 8, 2)
        rows: Any = [{**batch, "labels": batch["input_ids"]}]
        return DataLoader(rows, batch_size=None)


def callback(samples: int = 6, **options: Any) -> FASPPruning:
    """What every process runs; two windows a batch."""
    defaults = {"sparsity": 0.4, "axes": ["group", "channel"], "batch_size": 2, "length": 24}
    return FASPPruning(samples=samples, **{**defaults, **options})


def trainer_of(*callbacks: Any, **options: Any) -> Trainer:
    """A silent trainer that takes no step."""
    defaults = {"devices": 1, "enable_model_summary": False, "max_steps": 0}
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )


def share(trainer: Trainer, samples: int) -> int:
    """Batches of this process; each has two windows."""
    return len(range(samples // 2)[trainer.global_rank :: trainer.world_size])


def main(folder: Path, samples: int) -> None:
    """Prune on two processes; each writes what it ended with."""
    torch.set_num_threads(1)
    strategy = DDPStrategy(process_group_backend="gloo")
    fasp = callback(samples)
    trainer = trainer_of(fasp, devices=2, strategy=strategy)
    module = PrunableLM.from_model(tiny_model("llama"))
    trainer.fit(module, datamodule=Windows())
    weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    save_file(weights, folder / f"{samples}-{trainer.global_rank}.safetensors")
    result = {"layout": module.layout.to_dict(), "batches": share(trainer, samples)}
    path = folder / f"{samples}-{trainer.global_rank}.json"
    path.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
