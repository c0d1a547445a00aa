"""Faults on one of two processes: `python fault_ranks.py FOLDER`, started twice from outside."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import PrunableLM
from lit_prune.callbacks import FASPPruning, LoRARecovery
from lit_prune.errors import UserError
from tests.crowded import crowded
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_tokenizer, make_trainer


class Spoiled(PrunableLM):
    """Its loss is no number in the third step of the second process."""

    def loss(self, batch: Any, output: Any, own: Any = None) -> Any:
        """The loss, or NaN."""
        value = super().loss(batch, output, own)
        bad = self.trainer.global_rank == 1 and self.trainer.global_step == 2
        return value * float("nan") if bad else value


def fit(folder: Path, kind: type[PrunableLM], *, crowd: bool, steps: int) -> Any:
    """Prune and recover on both processes, of which the second may have little memory."""
    module = kind.from_model(tiny_model("llama"), make_tokenizer(), learning_rate=1e-3)
    strategy = DDPStrategy(process_group_backend="gloo")
    callbacks = [FASPPruning(samples=8, length=16, batch_size=2), LoRARecovery(rank=2)]
    trainer = make_trainer(folder, callbacks, steps, devices=2, strategy=strategy)
    short = crowd and trainer.global_rank == 1
    with crowded(module.model, 1) if short else nullcontext([]) as failures:
        trainer.fit(module, datamodule=make_data(folder, train=str(folder / "text.txt")))
    weights = {name: value.detach().clone() for name, value in module.model.named_parameters()}
    return {
        "layout": module.layout.to_dict(),
        "weights": weights,
        "history": module.history,
        "failures": failures,
    }


def main(folder: Path) -> None:
    """Run all fits."""
    torch.set_num_threads(1)
    found = {str(crowd): fit(folder, PrunableLM, crowd=crowd, steps=0) for crowd in (False, True)}
    try:
        fit(folder, Spoiled, crowd=False, steps=5)
    except UserError as error:
        found["nan"] = str(error)
    torch.save(found, folder / f"end{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
