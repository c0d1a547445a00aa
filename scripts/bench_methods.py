"""Compare the pruning methods on the embedded model: perplexity, seconds and memory of each.

Every cell (a method at a sparsity, with a restoration, a calibration seed, and recovery or none) is
measured in a fresh process and written to a JSON file of its own, so that a bench that was stopped
goes on where it was. Cells of another protocol are refused. What was not run is shown as not run::

    python scripts/bench_methods.py run --data DIR [--only REGEX] [--minutes N]
    python scripts/bench_methods.py table --data DIR

The data folder holds text/wikitext2-train-head.txt and text/wikitext2-test.txt. The ratios are of
the test text's perplexity to the dense model's. Methods' options are written below; those that are
not a paper's were chosen on the held-out end of the training text (`--judge validation`), never on
the test text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "embedded:smollm2-135m-instruct"
SAMPLES, LENGTH = 32, 512
WINDOW, TOKENS = 2048, 65_536
STEPS, BATCH, RANK, RATE = 100, 2, 32, 1e-3
CLAIM_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        callback: Class in `lit_prune.callbacks`.
        options: Its options, beside sparsity, axes and restoration.
        own: The method's own restoration, in the column without least squares.
        claims: Rows that it is said to beat.
    """

    callback: str
    options: dict[str, Any] = field(default_factory=dict)
    own: str = "none"
    claims: tuple[str, ...] = ()


#: One row a method, all on FFN channels.
METHODS: dict[str, Method] = {
    "dense": Method(""),
    "random": Method("RandomPruning"),
    "magnitude-l1": Method("MagnitudePruning", {"norm": "l1"}),
    "magnitude-l2": Method("MagnitudePruning", {"norm": "l2"}),
    "wanda-sp": Method("WandaPruning"),
    "flap": Method("FLAPPruning", own="bias"),
    "taylor-vector": Method("TaylorPruning", {"estimate": "vector"}),
    "taylor-element1": Method("TaylorPruning", {"estimate": "element1"}),
    "taylor-element2": Method("TaylorPruning", {"estimate": "element2"}),
    "taylor-mixed": Method("TaylorPruning", {"estimate": "mixed"}),
    "fasp": Method("FASPPruning", claims=("wanda-sp", "flap")),
    "fisher": Method("FisherPruning"),
    "cce": Method("CoupledComponentPruning", claims=("random", "magnitude-l2")),
    "fusion": Method(
        "AdaptiveFusionPruning",
        claims=("fusion-vector", "fusion-element1", "fusion-element2", "fusion-mixed"),
    ),
    "fusion-vector": Method("AdaptiveFusionPruning", {"estimate": "vector"}),
    "fusion-element1": Method("AdaptiveFusionPruning", {"estimate": "element1"}),
    "fusion-element2": Method("AdaptiveFusionPruning", {"estimate": "element2"}),
    "fusion-mixed": Method("AdaptiveFusionPruning", {"estimate": "mixed"}),
    "vib": Method("VIBPruning", claims=("flap", "wanda-sp")),
    "mini-llm": Method("ZerothOrderPruning", claims=("mini-llm-gradient", "mini-llm-magnitude")),
    "mini-llm-wanda": Method("ZerothOrderPruning", {"criterion": "wanda"}),
    "mini-llm-magnitude": Method("ZerothOrderPruning", {"criterion": "magnitude"}),
    "mini-llm-gradient": Method("ZerothOrderPruning", {"criterion": "gradient"}),
}
MAIN = [name for name in METHODS if not name.startswith(("mini-llm-", "fusion-", "dense"))]


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    method: str
    percent: int = 0
    restoration: str = "own"
    seed: int = 0
    recovery: bool = False

    @property
    def name(self) -> str:
        """Its file name, without suffix."""
        parts = [self.method]
        if self.percent:
            parts += [str(self.percent), self.restoration, f"seed{self.seed}"]
        return "_".join([*parts, *(["recovered"] if self.recovery else [])])


def cells() -> list[Cell]:
    """All of them, the most telling first."""
    found = [Cell("dense")]
    for percent in (20, 50):
        for restoration in ("own", "least_squares"):
            found += [Cell(name, percent, restoration) for name in MAIN]
    compared = {m for name, row in METHODS.items() if row.claims for m in (name, *row.claims)}
    for seed in CLAIM_SEEDS:
        for percent in (20, 50):
            found += [Cell(m, percent, _claimed(m), seed) for m in METHODS if m in compared]
    found += [Cell(name, 20, "least_squares", recovery=True) for name in MAIN]
    found += [Cell(name, 50, "least_squares", recovery=True) for name in MAIN]
    return list(dict.fromkeys(found))


def _claimed(method: str) -> str:
    """With which restoration a method's claim is judged: FASP's includes least squares."""
    return "least_squares" if method == "fasp" else "own"


def protocol(data: Path, judge: str) -> dict[str, Any]:
    """What every cell of a table must share."""
    digests = {
        name: hashlib.sha256((data / "text" / name).read_bytes()).hexdigest()[:16]
        for name in ("wikitext2-train-head.txt", "wikitext2-test.txt")
    }
    return {
        "model": MODEL,
        "dtype": "bfloat16",
        "axes": ["channel"],
        "texts": digests,
        "judge": judge,
        "window": WINDOW,
        "tokens": TOKENS,
        "calibration": f"{SAMPLES} x {LENGTH}, unless the row's options say otherwise",
        "recovery": f"{STEPS} steps of {BATCH} x {LENGTH}, LoRA rank {RANK}, rate {RATE:g}, "
        "cross-entropy and KL from the dense model",
        "threads": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    }


# --- one cell, in a process of its own ---------------------------------------------------------


def resident(key: str) -> int:
    """A figure of this process's memory in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure(cell: Cell, data: Path, judge: str) -> dict[str, Any]:
    """Prune, recover if asked to, and take the perplexity."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from lit_prune import PrunableLM, TextDataModule, callbacks
    from lit_prune.evaluation import perplexity

    class Meter(Callback):
        """Seconds and memory from before the calibration to after the last cut."""

        def __init__(self) -> None:
            self.found: dict[str, float] = {}

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.before, self.start = resident("VmRSS"), time.perf_counter()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

        def on_after_cut(self, trainer: Any, pl_module: Any) -> None:
            peak = resident("VmHWM") - self.before
            self.found = {"seconds": time.perf_counter() - self.start, "peak_mib": peak / 2**20}

    seed_everything(0)
    text = data / "text"
    texts = TextDataModule(
        str(text / "wikitext2-train-head.txt"),
        test=str(text / "wikitext2-test.txt"),
        length=LENGTH,
        batch_size=BATCH,
        window=WINDOW,
        validation_tokens=TOKENS,
        seed=cell.seed,
    )
    module, meter = PrunableLM(MODEL, learning_rate=RATE), Meter()
    module.configure_model()
    result: dict[str, Any] = {}
    if cell.method != "dense":
        row = METHODS[cell.method]
        restoration = row.own if cell.restoration == "own" else cell.restoration
        pruning = getattr(callbacks, row.callback)(
            **{
                "sparsity": cell.percent / 100,
                "axes": ["channel"],
                "restoration": restoration,
                "samples": SAMPLES,
                "length": LENGTH,
                **row.options,
            }
        )
        steps: list[Any] = [meter, pruning]
        if cell.recovery:
            steps += [callbacks.LoRARecovery(rank=RANK, alpha=2 * RANK), callbacks.Distillation()]
        trainer = Trainer(
            accelerator="cpu",
            max_steps=pruning.last_step + (STEPS if cell.recovery else 0),
            callbacks=steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=texts)
        (entry,) = module.history
        module.finish()
        result = {**meter.found, "sparsity": entry["sparsity"], "options": entry["options"]}
        result["recovery_seconds"] = module.seconds.get("recover", 0.0)
    else:
        texts.tokenizer = module.tokenizer
    loader = texts.test_dataloader() if judge == "test" else texts.val_dataloader()
    return result | {"perplexity": perplexity(module.model, loader, progress="perplexity").value}


# --- all of them -------------------------------------------------------------------------------


def path_of(out: Path, cell: Cell) -> Path:
    """Where a cell's result lies."""
    return out / f"{cell.name}.json"


def read(out: Path, cell: Cell, expected: dict[str, Any]) -> dict[str, Any] | None:
    """A cell's result, if it was run.

    Raises:
        SystemExit: It was run under another protocol.
    """
    path = path_of(out, cell)
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["protocol"] != expected:
        other = [key for key in expected if found["protocol"].get(key) != expected[key]]
        raise SystemExit(
            f"expected cells of one protocol, got {path.name} with another {', '.join(other)}; "
            "move it away or give another --out"
        )
    return found


def run(data: Path, out: Path, judge: str, only: str, minutes: float) -> None:
    """Run the cells that are missing."""
    out.mkdir(parents=True, exist_ok=True)
    expected, end = protocol(data, judge), time.monotonic() + 60 * minutes
    todo = [c for c in cells() if re.search(only, c.name) and read(out, c, expected) is None]
    for number, cell in enumerate(todo):
        if time.monotonic() > end:
            print(f"time is up; {len(todo) - number} cells are left", file=sys.stderr)
            return
        print(f"{number + 1}/{len(todo)} {cell.name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "cell", "--data", str(data), "--judge", judge]
        command += ["--name", cell.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"  failed: {done.stderr.strip()[-500:]}", file=sys.stderr)
            continue
        result = {"protocol": expected, **json.loads(done.stdout.splitlines()[-1])}
        partial = path_of(out, cell).with_suffix(".part")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        partial.replace(path_of(out, cell))
        print(f"  perplexity {result['perplexity']:.3f}", file=sys.stderr, flush=True)


def table(data: Path, out: Path, judge: str) -> str:
    """Markdown of what was run."""
    expected = protocol(data, judge)
    found = {cell: read(out, cell, expected) for cell in cells()}
    dense = found[Cell("dense")]
    if dense is None:
        raise SystemExit("expected the dense model's cell, got none; run --only dense first")

    def ratio(cell: Cell) -> str:
        result = found.get(cell)
        return "not run" if result is None else f"{result['perplexity'] / dense['perplexity']:.3f}"

    lines = [f"dense: {dense['perplexity']:.3f}; protocol: {json.dumps(expected)}", ""]
    heads = ["method", "20 %", "+ LS", "+ LS, recovery", "50 %", "+ LS", "+ LS, recovery"]
    lines += [_row([*heads, "seconds", "peak MiB", "removed"]), _row(["---"] * 10)]
    for name in MAIN:
        columns = [name]
        for percent in (20, 50):
            columns += [ratio(Cell(name, percent, kind)) for kind in ("own", "least_squares")]
            columns.append(ratio(Cell(name, percent, "least_squares", recovery=True)))
        own = found.get(Cell(name, 20, "own"))
        columns += ["not run"] * 3 if own is None else _costs(own)
        lines.append(_row(columns))
    return "\n".join([*lines, "", *_claims(found, dense["perplexity"])])


def _row(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _costs(result: dict[str, Any]) -> list[str]:
    share = f"{100 * result['sparsity']['decoder']:.2f} %"
    return [f"{result['seconds']:.0f}", f"{result['peak_mib']:.0f}", share]


def _claims(found: dict[Cell, Any], dense: float) -> list[str]:
    """Mean and spread over calibration seeds of the rows that are compared."""
    lines = [
        _row(["claim", "sparsity", "ratio, mean (spread)", "others"]),
        _row(["---"] * 4),
    ]

    def spread(name: str, percent: int) -> str:
        runs = [found.get(Cell(name, percent, _claimed(name), seed)) for seed in CLAIM_SEEDS]
        values = [one["perplexity"] / dense for one in runs if one is not None]
        if len(values) < len(CLAIM_SEEDS):
            return "not run"
        return f"{statistics.mean(values):.3f} ({max(values) - min(values):.3f})"

    for name, row in METHODS.items():
        for percent in (20, 50) if row.claims else ():
            others = "; ".join(f"{other} {spread(other, percent)}" for other in row.claims)
            lines.append(_row([name, f"{percent} %", spread(name, percent), others]))
    return lines


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["run", "table", "cell", "list"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with text/")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_methods"))
    parser.add_argument("--judge", choices=["test", "validation"], default="test")
    parser.add_argument("--only", default="", help="regular expression of cells' names")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after that")
    parser.add_argument("--name", help="the cell to measure")
    given = parser.parse_args()
    if given.command == "run":
        run(given.data, given.out, given.judge, given.only, given.minutes)
    elif given.command == "table":
        print(table(given.data, given.out, given.judge))
    elif given.command == "list":
        print("\n".join(cell.name for cell in cells()))
    else:
        (cell,) = [cell for cell in cells() if cell.name == given.name]
        print(json.dumps(measure(cell, given.data, given.judge)))


if __name__ == "__main__":
    main()
