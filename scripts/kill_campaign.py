"""Kill `lit-prune fit` at seeded moments of every phase, resume it, and compare what comes out.

For each method a fit of a tiny model runs to its end. Then the same fit is killed (`kill -9` of its
process group) again and again, each time in the phase that its turn says, and started again with
`--ckpt_path last`, until it ends. Weights, config, metrics and the last checkpoint must equal those
of the uninterrupted fit::

    python scripts/kill_campaign.py --out DIR [--mode single] [--mode ddp] [--quick]

It prints a table of phases, hits and survivals, and ends with code 1 if anything differs or a phase
was hit too rarely.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from kill_fits import configuration, make_inputs

PHASES = ("calibration", "mask learning", "cut", "recovery", "export")
LEAST = 3
#: In which phases a fit is killed, one after the other. At least `LEAST` in each.
CHAINS = [
    ("fasp", ["calibration", "cut", "recovery", "export"]),
    ("cce", ["calibration", "between cuts", "calibration", "cut", "recovery"]),
    ("vib", ["mask learning", "mask learning", "calibration", "recovery", "export"]),
    ("cce", ["cut", "between cuts", "cut", "export"]),
    ("vib", ["calibration", "mask learning", "cut", "export"]),
]
QUICK = [("fasp", ["calibration", "cut", "recovery", "export"])]
_NEVER_EQUAL = {"seconds", "dirpath", "best_model_path", "last_model_path", "tokens_per_second"}


@dataclass
class Kill:
    """One kill: where it was meant to hit, where it did, and whether the fit ended as it should."""

    mode: str
    method: str
    target: str
    phase: str = "missed"
    step: int = -1
    delay: float = 0.0
    wrong: list[str] = field(default_factory=list)


class Campaign:
    """Fits in a folder, killed and compared.

    Args:
        out: The folder.
        seed: Decides the moments.
    """

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.draw = out.resolve(), random.Random(seed)
        self.out.mkdir(parents=True, exist_ok=True)
        self.kills: list[Kill] = []
        if not (self.out / "model").exists():
            make_inputs(self.out)

    def command(self, method: str, mode: str, folder: Path) -> list[str]:
        """The command line of a fit."""
        config = self.out / f"{folder.name}.json"
        config.write_text(json.dumps(configuration(method, self.out, folder)), encoding="utf-8")
        command = [sys.executable, "-m", "lit_prune", "fit", "--config", str(config)]
        if mode == "ddp":
            command += ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
        return command

    def start(self, command: list[str], folder: Path) -> subprocess.Popen[bytes]:
        """Start a fit as the head of a process group of its own."""
        root = Path(__file__).resolve().parent
        paths = [str(root), str(root.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with folder.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def whole(self, method: str, mode: str) -> tuple[dict[str, str], dict[str, float]]:
        """Run a fit to its end; returns digests of its results and how long phases take."""
        folder = self.out / f"{mode}-{method}-whole"
        done = (folder / "pruned/config.json").exists()  # which is written last, and at once
        if not done and self.start(self.command(method, mode, folder), folder).wait():
            raise SystemExit(f"the uninterrupted fit failed: see {folder}.log")
        begins = [next(lines) for _, lines in groupby(marks(folder), key=lambda line: line[0])]
        lasted: dict[str, float] = {}
        for (phase, _, begin), (_, _, end) in pairwise(begins):
            lasted.setdefault(phase, end - begin)  # of its first occurrence
        return digests(folder), lasted

    def chain(self, method: str, mode: str, targets: list[str], number: int) -> None:
        """Kill a fit in one phase after the other, and compare what it ends with."""
        expected, lasted = self.whole(method, mode)
        folder = self.out / f"{mode}-{method}-{number}"
        command, kills = self.command(method, mode, folder), []
        for target in targets:
            delay = self.draw.uniform(0, 0.7) * lasted[target]
            kill = Kill(mode, method, target, delay=delay)
            process = self.start([*command, "--ckpt_path", "last"], folder)
            self._kill(process, kill, folder)
            kills.append(kill)
            print(f"{mode} {method}: killed in {kill.phase}, step {kill.step}", file=sys.stderr)
        code = self.start([*command, "--ckpt_path", "last"], folder).wait()
        found = digests(folder) if code == 0 else {}
        wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        for kill in kills:
            kill.wrong = wrong if code == 0 else [f"exit code {code}: see {folder}.log"]
        self.kills += kills
        self._write()

    def few(self) -> list[tuple[str, str]]:
        """Modes and phases with fewer hits than there should be."""
        hits = Counter((kill.mode, kill.phase) for kill in self.kills)
        modes = dict.fromkeys(kill.mode for kill in self.kills)
        return [(m, phase) for m in modes for phase in PHASES if hits[m, phase] < LEAST]

    def fill(self, mode: str) -> None:
        """Kill more fits in phases that were hit too rarely: some moments come a little late."""
        for attempt in range(LEAST):
            hits = Counter(kill.phase for kill in self.kills if kill.mode == mode)
            for phase in PHASES:
                missing = [phase] * (LEAST - hits[phase])
                if missing:
                    method = "vib" if phase == "mask learning" else "fasp"
                    self.chain(method, mode, missing, 100 + 10 * attempt + PHASES.index(phase))

    def _kill(self, process: subprocess.Popen[bytes], kill: Kill, folder: Path) -> None:
        seen = len(marks(folder))
        while process.poll() is None:
            if any(phase == kill.target for phase, *_ in marks(folder)[seen:]):
                time.sleep(kill.delay)
                break
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            found = marks(folder)[seen:]
            kill.phase, kill.step = found[-1][:2] if found else ("start", 0)
        process.wait()

    def _write(self) -> None:
        lines = [json.dumps(vars(kill)) for kill in self.kills]
        (self.out / "kills.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def table(self) -> Iterator[str]:
        """Lines of Markdown: phases with hits and survivals of each mode."""
        modes = list(dict.fromkeys(kill.mode for kill in self.kills))
        yield "| phase | " + " | ".join(f"{mode}: survived / hit" for mode in modes) + " |"
        yield "| --- |" + " ---: |" * len(modes)
        hits = Counter((kill.mode, kill.phase) for kill in self.kills)
        good = Counter((kill.mode, kill.phase) for kill in self.kills if not kill.wrong)
        others = sorted({kill.phase for kill in self.kills} - set(PHASES))
        for phase in [*PHASES, *others]:
            cells = [f"{good[mode, phase]} / {hits[mode, phase]}" for mode in modes]
            yield f"| {phase} | " + " | ".join(cells) + " |"


def marks(folder: Path) -> list[tuple[str, int, float]]:
    """Phases that a fit in a folder has entered, with step and time."""
    path = folder.with_suffix(".marks")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    cells = [line.split("\t") for line in lines if line.endswith("\n")]
    return [(phase, int(step), float(when)) for phase, step, when in cells]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what must be equal: exported files, metrics, and parts of the last checkpoint."""
    import torch

    files = [*(folder / "pruned").glob("*.safetensors"), folder / "pruned/config.json"]
    files.append(folder / "logs/version_0/metrics.csv")
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    for name, part in content.items():
        digest = hashlib.sha256()
        _feed(digest, part)
        found[f"last.ckpt: {name}"] = digest.hexdigest()
    return found


def _feed(digest: Any, value: Any) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, part in value.items():
            digest.update(str(key).encode())
            if key not in _NEVER_EQUAL:
                _feed(digest, part)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mode", choices=["single", "ddp"], action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="four kills of one method only")
    args = parser.parse_args()
    begin, campaign = time.monotonic(), Campaign(args.out, args.seed)
    for mode in args.mode or ["single", "ddp"]:
        for number, (method, targets) in enumerate(QUICK if args.quick else CHAINS):
            campaign.chain(method, mode, targets, number)
        if not args.quick:
            campaign.fill(mode)
    print("\n".join(campaign.table()))
    for kill in campaign.kills:
        if kill.wrong:
            print(f"{kill.mode} {kill.method}, killed in {kill.phase}: {'; '.join(kill.wrong)}")
    print(f"{len(campaign.kills)} kills in {(time.monotonic() - begin) / 60:.1f} minutes")
    few = [] if args.quick else campaign.few()
    for mode, phase in few:
        print(f"{mode}: fewer than {LEAST} kills in {phase}")
    return int(bool(few) or any(kill.wrong for kill in campaign.kills))


if __name__ == "__main__":
    sys.exit(main())
