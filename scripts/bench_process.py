"""One cell of the bench of the methods, in this process: what `bench_methods.py cell` runs."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from typing import Any

from bench_cells import (
    BATCH,
    DENSE,
    DTYPE,
    LENGTH,
    METHODS,
    MODEL,
    RANK,
    RATE,
    STEPS,
    TOKENS,
    WINDOW,
    Cell,
    asked,
)
from lightning.pytorch import Callback, Trainer, seed_everything

from lit_prune import PrunableLM, TextDataModule, callbacks
from lit_prune.evaluation.perplexity import perplexity


def resident(key: str) -> int:
    """A figure of this process's memory in bytes, such as VmRSS or its peak, VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def restart_peak() -> int:
    """Let VmHWM start anew; the resident bytes now, without what lies freed on the heap."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class Meter(Callback):
    """Seconds and memory from before the calibration to after the last cut."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.before, self.start = restart_peak(), time.perf_counter()

    def on_after_cut(self, trainer: Any, pl_module: Any) -> None:
        """Read it."""
        peak = resident("VmHWM") - self.before
        self.found = {"seconds": time.perf_counter() - self.start, "peak_mib": peak / 2**20}


def measure(cell: Cell, data: Path, judge: str) -> dict[str, Any]:
    """Prune, recover if asked to, and take the perplexity."""
    seed_everything(0)
    module = PrunableLM(MODEL, dtype=DTYPE, learning_rate=RATE)
    module.configure_model()
    result = {} if cell == DENSE else _prune(cell, module, data)
    texts = _texts(data, cell, BATCH, module)
    loader = texts.test_dataloader() if judge == "test" else texts.val_dataloader()
    return result | {"perplexity": perplexity(module.model, loader, progress="perplexity").value}


def _texts(data: Path, cell: Cell, batch: int, module: PrunableLM) -> TextDataModule:
    text = data / "text"
    texts = TextDataModule(
        str(text / "wikitext2-train-head.txt"),
        test=str(text / "wikitext2-test.txt"),
        length=LENGTH,
        batch_size=batch,
        window=WINDOW,
        validation_tokens=TOKENS,
        seed=cell.seed,
    )
    texts.tokenizer = module.tokenizer
    return texts


def _prune(cell: Cell, module: PrunableLM, data: Path) -> dict[str, Any]:
    """Prune, and recover in a fit of its own, so that all see the same data in the same order."""
    options, row = asked(cell), METHODS[cell.method]
    pruning, meter = getattr(callbacks, row.callback)(**options), Meter()
    module.keep_teacher = cell.recovery
    _fit(module, _texts(data, cell, row.batch, module), pruning.last_step, [meter, pruning])
    if cell.recovery:
        lora = callbacks.LoRARecovery(rank=RANK, alpha=2 * RANK)
        _fit(module, _texts(data, cell, BATCH, module), STEPS, [lora, callbacks.Distillation()])
    *_, entry = module.history
    module.finish()
    return {
        **meter.found,
        "sparsity": entry["sparsity"],
        "asked": options,
        "options": entry["options"],
        "recovery_seconds": module.seconds.get("recover", 0.0),
    }


def _fit(module: PrunableLM, texts: TextDataModule, steps: int, added: list[Any]) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=added,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, datamodule=texts)
