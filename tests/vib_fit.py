"""Short fits that train masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_prune import PrunableLM
from lit_prune.callbacks.vib import VIBPruning
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_tokenizer, make_trainer

SMALL: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2, "multiple": 8}


def pruning(sparsity: float = 0.4, steps: int = 6, **options: Any) -> VIBPruning:
    return VIBPruning(sparsity, steps=steps, **{"rate": 0.5, **SMALL, **options})


def fitted(
    folder: Path,
    callback: VIBPruning,
    *others: Any,
    name: str = "gpt2",
    steps: int = 8,
    **more: Any,
) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model(name), make_tokenizer(), learning_rate=1e-2, **more)
    trainer = make_trainer(folder, [callback, *others], steps)
    trainer.fit(module, datamodule=make_data(folder))
    return module
