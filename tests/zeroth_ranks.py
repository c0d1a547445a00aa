"""MINI-LLM and Fisher in fits of no steps, on two processes: `python zeroth_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import PrunableLM
from lit_prune.callbacks.fisher import FisherPruning
from lit_prune.callbacks.zeroth import ZerothOrderPruning
from lit_prune.pruning import PruningCallback
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model

SMALL: dict[str, Any] = {"samples": 6, "length": 24, "batch_size": 2, "sparsity": 0.4}


def callbacks() -> dict[str, PruningCallback]:
    """What is run; five windows for gradients are three of one process and two of the other."""
    own: dict[str, Any] = {**SMALL, "gradient_samples": 5}
    return {
        "weights": ZerothOrderPruning(**own),
        "gates": ZerothOrderPruning(perturb="gates", **own),
        "backprop": ZerothOrderPruning(gradient="backprop", **own),
        "fisher": FisherPruning(axes=("group", "channel"), restoration="none", **SMALL),
    }


def layouts(processes: int = 1) -> dict[str, Any]:
    """What each callback leaves of the tiny model."""
    found = {}
    for name, callback in callbacks().items():
        options: dict[str, Any] = {}
        if processes > 1:
            strategy = DDPStrategy(process_group_backend="gloo")  # one for each trainer
            options = {"devices": processes, "strategy": strategy}
        module = PrunableLM.from_model(tiny_model("llama"))
        trainer_of(callback, **options).fit(module, datamodule=Windows())
        found[name] = module.layout.to_dict()
    return found


def main(folder: Path) -> None:
    """Run on two processes; each writes what it ended with."""
    torch.set_num_threads(1)
    found = layouts(2)
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
