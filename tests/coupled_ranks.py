"""CCE in fits of no steps on two processes: `python coupled_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import PrunableLM
from lit_prune.callbacks.coupled import CoupledComponentPruning
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model


def callback(gradients: Any) -> CoupledComponentPruning:
    """What every process runs: five sentences, so that one process has fewer."""
    return CoupledComponentPruning(0.4, gradients=gradients, samples=5, length=16)


def main(folder: Path) -> None:
    """Prune on two processes; each writes what it ended with."""
    torch.set_num_threads(1)
    for gradients in ("full", "lora"):
        strategy = DDPStrategy(process_group_backend="gloo")
        trainer = trainer_of(callback(gradients), devices=2, strategy=strategy)
        module = PrunableLM.from_model(tiny_model("llama"))
        trainer.fit(module, datamodule=Windows())
        path = folder / f"{gradients}-{trainer.global_rank}.json"
        path.write_text(json.dumps(module.layout.to_dict()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
