"""Measure FASP on the embedded model: perplexity, time against its floor, memory, recovery.

The data folder holds text/wikitext2-train-head.txt and text/wikitext2-test.txt. Each part prints a
JSON object with its protocol; run the parts one at a time on a machine that does nothing else::

    python scripts/bench_fasp.py perplexity --data DIR
    python scripts/bench_fasp.py time --data DIR
    python scripts/bench_fasp.py memory --data DIR
    python scripts/bench_fasp.py recovery --data DIR --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from bench_process import resident, restart_peak
from lightning.pytorch import Callback, Trainer, seed_everything

from lit_prune import PrunableLM, TextDataModule
from lit_prune.allocation.plan import Plan, uniform
from lit_prune.calibration.stream import Stream
from lit_prune.callbacks import Distillation, ExportCheckpoint, FASPPruning, LoRARecovery
from lit_prune.cutting.layerwise import Restoration, by_columns, prune_layers
from lit_prune.evaluation.perplexity import perplexity
from lit_prune.progress import track
from lit_prune.restoration.least_squares import Gram, least_squares
from lit_prune.scores import column_scores
from lit_prune.structure.counting import count_actual, unique_labels

MODEL = "embedded:smollm2-135m-instruct"
SAMPLES, LENGTH, BATCH = 32, 512, 4
WINDOW, TOKENS = 2048, 65_536


def load(data: Path) -> tuple[PrunableLM, TextDataModule]:
    """The dense model in bfloat16, and the texts."""
    module = PrunableLM(MODEL, dtype="bfloat16")
    module.configure_model()
    texts = TextDataModule(
        str(data / "text" / "wikitext2-train-head.txt"),
        test=str(data / "text" / "wikitext2-test.txt"),
        length=LENGTH,
        batch_size=BATCH,
        window=WINDOW,
        validation_tokens=TOKENS,
    )
    texts.tokenizer = module.tokenizer
    return module, texts


def measure(module: PrunableLM, texts: TextDataModule) -> float:
    """Perplexity of the test text."""
    return perplexity(module.model, texts.test_dataloader(), progress="perplexity").value


def plan_of(module: PrunableLM, sparsity: float) -> Plan:
    """Uniform removal of FFN channels."""
    labels = unique_labels(module.model, module.structure)
    return uniform(labels, module.structure.widths, sparsity, ["channel"])


def prune(
    module: PrunableLM, batches: list[dict[str, torch.Tensor]], plan: Plan, restore: bool = True
) -> float:
    """Prune in place; the seconds it took, the pass into the first layer included."""
    start = time.perf_counter()
    prune_layers(
        module.model,
        module.structure,
        Stream(module.model, module.structure, batches),
        by_columns(module.structure, lambda w, x: column_scores(w, x.norms()), plan),
        ["channel"],
        restoration=Restoration("least_squares" if restore else "none"),
        track=lambda layers: track(layers, "pruning layers"),
    )
    return time.perf_counter() - start


def bench_perplexity(data: Path, **_: Any) -> dict[str, Any]:
    """Ratios to dense at 20 % and 50 %, with and without restoration."""
    module, texts = load(data)
    dense, rows = measure(module, texts), []
    for sparsity in (0.2, 0.5):
        for restore in (True, False):
            module, texts = load(data)
            before = count_actual(module.model, module.structure, decoder=True)
            batches = texts.calibration_batches(SAMPLES, LENGTH, BATCH)
            seconds = prune(module, batches, plan_of(module, sparsity), restore)
            left = count_actual(module.model, module.structure, decoder=True)
            value = measure(module, texts)
            rows.append(
                {
                    "target": sparsity,
                    "restoration": restore,
                    "decoder_sparsity": 1 - left / before,
                    "perplexity": value,
                    "ratio": value / dense,
                    "seconds": seconds,
                }
            )
    return {"protocol": texts.protocol("test"), "dense": dense, "rows": rows}


def forward_seconds(module: PrunableLM, batches: list[dict[str, torch.Tensor]]) -> float:
    """One forward pass over the calibration tokens, without the output head."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            module.model.model(input_ids=batch["input_ids"], use_cache=False)
    return time.perf_counter() - start


def gram_seconds(gram: Gram, calls: int) -> float:
    """The products of every layer and batch."""
    inputs = torch.randn(BATCH * LENGTH, len(gram.matrix), dtype=torch.bfloat16)
    start = time.perf_counter()
    for _call in range(calls):
        gram.add(inputs)
    return time.perf_counter() - start


def solve_seconds(weight: torch.Tensor, gram: Gram, kept: int, layers: int) -> float:
    """The least squares of every layer."""
    keep = torch.arange(kept)
    start = time.perf_counter()
    for _layer in range(layers):
        least_squares(weight, gram.matrix, keep)
    return time.perf_counter() - start


def bench_time(data: Path, **_: Any) -> dict[str, Any]:
    """Pruning time, and the floor: a forward pass, the Gram products and the solves, alone."""
    rounds: list[dict[str, float]] = []
    for _round in range(3):
        module, texts = load(data)
        batches = texts.calibration_batches(SAMPLES, LENGTH, BATCH)
        plan = plan_of(module, 0.2)
        weight = module.model.get_submodule("model.layers.0.mlp.down_proj").weight.detach()
        layers, channels = len(module.structure.widths.layers), weight.shape[1]
        gram, kept = Gram(channels), channels - plan.removed["channel"][0]
        row = {
            "forward": forward_seconds(module, batches),
            "gram": gram_seconds(gram, layers * len(batches)),
            "solve": solve_seconds(weight, gram, kept, layers),
            "prune": prune(module, batches, plan),
        }
        row["ratio"] = row["prune"] / (row["forward"] + row["gram"] + row["solve"])
        rounds.append(row)
    middle = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    return {"median": middle, "rounds": rounds, "threads": torch.get_num_threads()}


def bench_memory(data: Path, **_: Any) -> dict[str, Any]:
    """Peak RSS while calibrating and pruning, over that just before."""
    module, texts = load(data)
    batches = texts.calibration_batches(SAMPLES, LENGTH, BATCH)
    plan = plan_of(module, 0.2)
    before = restart_peak()
    prune(module, batches, plan)
    peak = resident("VmHWM")
    mib = {"before": before / 2**20, "peak": peak / 2**20, "rise": (peak - before) / 2**20}
    return {"mib": mib, "threads": torch.get_num_threads()}


def bench_recovery(
    data: Path, out: Path, steps: int, rank: int, rate: float, **_: Any
) -> dict[str, Any]:
    """The 20 % model after 100 steps, and the dense model with the same LoRA, data and steps."""
    module, texts = load(data)
    results: dict[str, Any] = {"dense": measure(module, texts)}
    for name in ("pruned", "control"):
        seed_everything(0)
        module, texts = load(data)
        module.optimization["lr"] = rate
        callbacks: list[Callback] = [FASPPruning(0.2, samples=SAMPLES, length=LENGTH)]
        callbacks = callbacks if name == "pruned" else []
        callbacks += [LoRARecovery(rank=rank, alpha=2 * rank), Distillation()]
        callbacks.append(ExportCheckpoint(name))
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=out,
        )
        start = time.perf_counter()
        trainer.fit(module, datamodule=texts)
        seconds = time.perf_counter() - start
        results[name] = {
            "perplexity": measure(module, texts),
            "inside": perplexity(module.model, texts.val_dataloader()).value,
            "seconds": seconds,
            "recover_seconds": module.seconds.get("recover", math.nan),
        }
    pruned, control = results["pruned"]["perplexity"], results["control"]["perplexity"]
    ratios = {"to_dense": pruned / results["dense"], "to_control": pruned / control}
    protocol = texts.protocol("test") | {"steps": steps, "rank": rank, "learning_rate": rate}
    return {"protocol": protocol, **results, "ratios": ratios}


PARTS = {
    "perplexity": bench_perplexity,
    "time": bench_time,
    "memory": bench_memory,
    "recovery": bench_recovery,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where exports go")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    given = parser.parse_args()
    options = {key: value for key, value in vars(given).items() if key != "part"}
    print(json.dumps(PARTS[given.part](**options), indent=1))
