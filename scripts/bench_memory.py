"""Peak memory of methods that take gradients, or do without, against what they must keep.

Each part runs in a fresh process on the embedded model in bfloat16::

    python scripts/bench_memory.py --data DIR

Weights and activations are the model's parameters and what a forward pass of one calibration batch
adds while it keeps what a backward pass needs (`graph`), or without (`forward`). A method's figure
is the parameters and the rise of RSS from before its scores to their end, divided by that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_cells import DTYPE, LENGTH, MODEL

SAMPLES = 4
#: Method, and its options.
SCORED: dict[str, tuple[str, dict[str, Any]]] = {
    "taylor-vector": ("TaylorPruning", {"estimate": "vector"}),
    "taylor-element1": ("TaylorPruning", {"estimate": "element1"}),
    "taylor-element2": ("TaylorPruning", {"estimate": "element2"}),
    "taylor-mixed": ("TaylorPruning", {"estimate": "mixed"}),
    "fusion": ("AdaptiveFusionPruning", {}),
    "cce": ("CoupledComponentPruning", {"axes": ["channel", "query", "hidden"]}),
    "fisher": ("FisherPruning", {}),
    "mini-llm": ("ZerothOrderPruning", {"gradient_samples": SAMPLES}),
}
AXES = ["channel", "group"]


def measure(name: str, data: Path, batch_size: int) -> dict[str, float]:
    """Rise of RSS of one part, and the bytes of the weights."""
    import torch
    from bench_process import resident, restart_peak

    from lit_prune import PrunableLM, TextDataModule, callbacks
    from lit_prune.calibration.calibration import Calibration
    from lit_prune.evaluation.sizes import weight_bytes
    from lit_prune.gradients.folded import differentiating, loss_of

    module = PrunableLM(MODEL, dtype=DTYPE)
    module.configure_model()
    texts = TextDataModule(str(data / "text" / "wikitext2-train-head.txt"))
    texts.tokenizer = module.tokenizer
    batches = texts.calibration_batches(SAMPLES * batch_size, LENGTH, batch_size)

    def graph() -> None:
        wanted = [n for n, _ in module.model.named_parameters() if ".layers." in n]
        with differentiating(module.model, wanted):
            loss_of(module.model, batches[0])

    def forward() -> None:
        with torch.no_grad():
            loss_of(module.model, batches[0])

    parts: dict[str, Callable[[], Any]] = {"graph": graph, "forward": forward}
    if name in SCORED:
        kind, options = SCORED[name]
        asked = {"axes": AXES, "batch_size": batch_size, **options}
        method = getattr(callbacks, kind)(**asked)
        axes = tuple(asked["axes"])
        calibration = Calibration(module.model, module.structure, batches, axes)
        parts[name] = lambda: method.score(calibration)
    before = restart_peak()
    parts[name]()
    return {"rise": resident("VmHWM") - before, "weights": weight_bytes(module.model)}


def main() -> None:
    """Measure all parts, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with text/")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--part", help="only this, in this process")
    given = parser.parse_args()
    if given.part:
        print(json.dumps(measure(given.part, given.data, given.batch_size)))
        return
    print(f"{SAMPLES} batches of {given.batch_size} x {LENGTH} tokens, {DTYPE}; MiB")
    print("| part | rise | of weights + activations |\n| --- | --- | --- |")
    floors: dict[str, float] = {}
    for name in ("graph", "forward", *SCORED):
        command = [sys.executable, __file__, "--data", str(given.data), "--part", name]
        command += ["--batch-size", str(given.batch_size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        total = found["rise"] + found["weights"]
        floors.setdefault(name, total)
        floor = floors["forward" if name == "mini-llm" else "graph"]
        share = f"{total / floor:.2f}" if name in SCORED else "1"
        print(f"| {name} | {found['rise'] / 2**20:.0f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
