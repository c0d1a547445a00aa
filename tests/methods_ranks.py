"""Every method in a fit on one process or two: `python methods_ranks.py FOLDER PROCESSES`.

The processes are started from outside, so that one pair runs all fits.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from lit_prune import Layout, PrunableLM
from lit_prune.callbacks import Distillation, LoRARecovery, RandomState
from lit_prune.errors import UserError
from lit_prune.structure import cut
from tests.method_table import METHODS
from tests.tiny_fit import Watch, make_data, make_trainer

#: What suits a model of three layers and eight windows better than the table's row.
CHANGES: dict[str, dict[str, Any]] = {"flap": {"axes": ["channel"]}}


def trainer_on(folder: Path, processes: int, callbacks: list[Any], steps: int) -> Any:
    """A trainer on this process and the others."""
    strategy: Any = DDPStrategy(process_group_backend="gloo") if processes > 1 else "auto"
    return make_trainer(folder, callbacks, steps, devices=processes, strategy=strategy)


def fit(folder: Path, processes: int, name: str) -> dict[str, Any]:
    """Prune, recover, and tell what stays and what training ended with."""
    seed_everything(0, verbose=False)
    module = PrunableLM(str(folder / "dense"), dtype="float32", learning_rate=1e-2)
    method, watch = METHODS[name], Watch()
    pruning = method.make(samples=8, batch_size=1, **CHANGES.get(name, {}))
    callbacks = [RandomState(), pruning, LoRARecovery(rank=2), Distillation(), watch]
    trainer = trainer_on(folder, processes, callbacks, method.steps)
    data = make_data(folder, train=str(folder / "text.txt"), batch_size=4 // processes)
    trainer.fit(module, datamodule=data)
    return {"layout": module.layout.to_dict(), "end": watch.end, "history": module.history}


class Corrupt(Callback):
    """Keeps other units on the second process, as many as on the first."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Cut."""

        def change() -> Any:
            kept = torch.arange(5) + trainer.global_rank
            layout = Layout.full(pl_module.structure.widths).replace_layer(0, {"channel": kept})
            cut(pl_module.model, pl_module.structure, layout)
            return layout

        pl_module.recut(trainer, change)


def corrupted(folder: Path, processes: int) -> str:
    """What is said when one process keeps other units."""
    module = PrunableLM(str(folder / "dense"), dtype="float32")
    data = make_data(folder, train=str(folder / "text.txt"))
    try:
        trainer_on(folder, processes, [Corrupt()], 1).fit(module, datamodule=data)
    except UserError as error:
        return str(error)
    return "nothing"


def main(folder: Path, processes: int, rank: int) -> None:
    """Run all fits; a method that fails leaves its traceback instead of a result."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in METHODS:
        try:
            found[name] = fit(folder, processes, name)
        except Exception:
            found[name] = traceback.format_exc()
            break  # the other process may wait for this one
    if processes > 1:
        found["corrupted"] = corrupted(folder, processes)
    torch.save(found, folder / f"{processes}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(os.environ.get("LOCAL_RANK", "0")))
