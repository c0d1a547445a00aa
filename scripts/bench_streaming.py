"""Peak memory of pruning against depth: from files to files, and in memory.

Random Llamas of equal width and growing depth are pruned by FASP, each in a fresh process after a
small one, so that what a first run loads and allocates once does not count::

    python scripts/bench_streaming.py [--method FLAPPruning]

A rise is that of RSS, from before the model is opened until its export is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DEPTHS = (8, 16, 32)
SAMPLES, LENGTH, SPARSITY = 8, 128, 0.3
#: About 12.6 MB a layer in float32.
WIDTH: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}


class RandomTokens:
    """A data module of noise."""

    trainer: Any = None

    def calibration_batches(self, samples: int, length: int, batch_size: int) -> list[Any]:
        """Windows of random tokens."""
        import torch

        made = torch.Generator().manual_seed(0)
        shape = (batch_size, length)
        return [
            {
                "input_ids": torch.randint(WIDTH["vocab_size"], shape, generator=made),
                "attention_mask": torch.ones(shape, dtype=torch.long),
            }
            for _ in range(samples // batch_size)
        ]


def make(folder: Path, depth: int) -> str:
    """Write a random Llama in float32; its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **WIDTH))
    model.save_pretrained(folder, max_shard_size="50MB")
    return str(folder)


def stream(method: str, source: str, out: Path) -> None:
    """Prune from files to files."""
    from lit_prune import PrunableLM, callbacks
    from lit_prune.streaming.prune import prune_streaming

    callback = getattr(callbacks, method)(sparsity=SPARSITY, samples=SAMPLES, length=LENGTH)
    module = PrunableLM(source, dtype="float32")
    prune_streaming(module, callback, RandomTokens(), out, shown=False)


def in_memory(method: str, source: str, out: Path) -> None:
    """Load, prune and export."""
    from lit_prune import PrunableLM, callbacks
    from lit_prune.calibration.calibration import Calibration
    from lit_prune.cutting.callback import sizes_of
    from lit_prune.structure import settle

    callback = getattr(callbacks, method)(sparsity=SPARSITY, samples=SAMPLES, length=LENGTH)
    module = PrunableLM(source, dtype="float32")
    module.configure_model()
    callback.original = sizes_of(module)
    batches = RandomTokens().calibration_batches(SAMPLES, LENGTH, callback.batch_size)
    calibration = Calibration(module.model, module.structure, batches, callback.axes)
    layout = callback.prune(calibration, callback.target(module))
    settle(module.model, module.structure, layout)
    module.layout = module.layout.then(layout)
    module.export(out, card="")


def measure(part: str, method: str, source: str, folder: Path) -> dict[str, float]:
    """Rise of RSS in MiB, in this process."""
    from bench_process import resident, restart_peak

    run = {"streaming": stream, "memory": in_memory}[part]
    run(method, make(folder / "small", 2), folder / "first")
    before = restart_peak()
    run(method, source, folder / "out")
    return {"rise": (resident("VmHWM") - before) / 2**20}


def table(method: str, depths: tuple[int, ...] = DEPTHS) -> list[dict[str, float]]:
    """A row for each depth: weights, and the rises of both ways."""
    rows = []
    for depth in depths:
        row: dict[str, float] = {"depth": depth}
        with tempfile.TemporaryDirectory() as made:
            source = Path(made) / "model"
            _fresh("make", method, source, depth=depth)
            files = source.glob("*.safetensors")
            row["weights"] = sum(file.stat().st_size for file in files) / 2**20
            for part in ("streaming", "memory"):
                row[part] = _fresh(part, method, source)["rise"]
        rows.append(row)
    return rows


def _fresh(part: str, method: str, source: Path, depth: int = 0) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", part, "--method", method]
    command += ["--source", str(source), "--depth", str(depth)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all depths, or what is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--method", default="FASPPruning", help="a callback of lit_prune.callbacks")
    parser.add_argument("--part", choices=("make", "streaming", "memory"), help="in this process")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--depth", type=int, default=0)
    given = parser.parse_args()
    if given.part == "make":
        make(given.source, given.depth)
        print("{}")
    elif given.part:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(given.part, given.method, str(given.source), Path(folder))
        print(json.dumps(found))
    else:
        print("| layers | weights MiB | streaming, rise MiB | in memory, rise MiB |")
        print("| --- | --- | --- | --- |")
        for row in table(given.method):
            figures = [f"{row[key]:.0f}" for key in ("weights", "streaming", "memory")]
            print(f"| {row['depth']:.0f} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
