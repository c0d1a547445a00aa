"""Compare the pruning methods on the embedded model: perplexity, seconds and memory of each.

Every cell (a method at a sparsity, with a restoration, a calibration seed, and recovery or none) is
measured in a fresh process and written to a JSON file of its own, so that a bench that was stopped
goes on where it was. Cells of another protocol are refused. What was not run is shown as not run::

    python scripts/bench_methods.py run --data DIR [--only REGEX] [--minutes N]
    python scripts/bench_methods.py table --data DIR

The data folder holds text/wikitext2-train-head.txt and text/wikitext2-test.txt. The ratios are of
the test text's perplexity to the dense model's. Methods' options are in `bench_cells.py`; those
that are neither a paper's nor a default were chosen on the held-out end of the training text
(`--judge validation`), never on the test text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_cells import (
    ASIDE,
    BEST,
    CLAIM_SEEDS,
    DENSE,
    MAIN,
    METHODS,
    Cell,
    cells,
    claimed,
    named,
    protocol,
    read,
    recovered,
)

ROOT = Path(__file__).parents[1]
Found = dict[Cell, dict[str, Any] | None]


def best_of(out: Path, expected: dict[str, Any]) -> list[str]:
    """The methods with the lowest perplexity at 50 % with least squares, once all are known."""
    found = {name: read(out, Cell(name, 50, "least_squares"), expected) for name in MAIN}
    known = {name: result["perplexity"] for name, result in found.items() if result is not None}
    return sorted(known, key=lambda name: known[name])[:BEST] if len(known) == len(MAIN) else []


def run(data: Path, out: Path, judge: str, only: str, minutes: float) -> None:
    """Run the cells that are missing.

    Raises:
        SystemExit: No cell has such a name, or some failed.
    """
    if not (chosen := [c for c in cells(MAIN) if re.search(only, c.name)]):
        raise SystemExit(f"expected --only to find names of cells (see list), got {only!r}")
    out.mkdir(parents=True, exist_ok=True)
    expected, end = protocol(data, judge), time.monotonic() + 60 * minutes
    failed: set[Cell] = set()

    def missing() -> list[Cell]:
        wanted = set(cells(best_of(out, expected)))
        left = [c for c in chosen if c in wanted and c not in failed]
        return [c for c in left if read(out, c, expected) is None]

    while todo := missing():
        cell = todo[0]
        if time.monotonic() > end:
            print(f"time is up; {len(todo)} cells are left", file=sys.stderr)
            return
        print(f"{cell.name}, {len(todo)} left", file=sys.stderr, flush=True)
        try:
            result = {"protocol": expected, **_measured(cell, data, judge, expected["threads"])}
        except RuntimeError as error:
            failed.add(cell)
            print(f"  failed: {error}", file=sys.stderr, flush=True)
            continue
        path = out / f"{cell.name}.json"
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
        partial.replace(path)
        print(f"  perplexity {result['perplexity']:.3f}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} cells failed")
    if not best_of(out, expected) and any(c.recovery and c.percent == 50 for c in chosen):
        print("recovery at 50 % waits for all cells with least squares", file=sys.stderr)


def _measured(cell: Cell, data: Path, judge: str, threads: str) -> dict[str, Any]:
    """A cell's figures from a fresh process, and the commit that they are of.

    Raises:
        RuntimeError: The process failed, or the code changed meanwhile.
    """
    code = _code()
    command = [sys.executable, __file__, "cell", "--data", str(data), "--judge", judge]
    done = subprocess.run(
        [*command, "--name", cell.name],
        capture_output=True,
        text=True,
        # the code beside this file, whatever is installed
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-500:])
    if _code() != code:
        raise RuntimeError(f"expected the same code until the end, got {code} and then {_code()}")
    return {"code": code, **json.loads(done.stdout.splitlines()[-1])}


def _code() -> str:
    """The commit that is checked out, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.check_output(command, cwd=ROOT, text=True).strip()


def table(data: Path, out: Path, judge: str) -> str:
    """Markdown of what was run."""
    expected = protocol(data, judge)
    best = best_of(out, expected)
    found: Found = {cell: read(out, cell, expected) for cell in cells(best)}
    dense = found[DENSE]
    if dense is None:
        raise SystemExit("expected the dense model's cell, got none; run --only dense first")
    heads = ["method", "20 %", "+ LS", "+ LS, recovery", "50 %", "+ LS", "+ LS, recovery"]
    lines = [f"dense: {dense['perplexity']:.3f}; protocol: {json.dumps(expected)}", ""]
    heads += ["seconds at 20 %", "at 50 %", "peak MiB", "removed"]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for name in MAIN:
        columns = [name]
        for percent in (20, 50):
            asked = [Cell(name, percent, kind) for kind in ("own", "least_squares")]
            columns += [_ratio(found, cell) for cell in (*asked, recovered(name, percent))]
            if percent == 50 and best and name not in best:
                columns[-1] = ""
        lines.append(_row([*columns, *_costs(found, name)]))
    for name in ASIDE:
        ratios = [_ratio(found, Cell(name, percent)) for percent in (20, 50)]
        lines.append(_row([name, ratios[0], "", "", ratios[1], "", "", *_costs(found, name)]))
    return "\n".join([*lines, "", *_claims(found), "", *_options(found), *_reached(found)])


def _row(columns: list[str]) -> str:
    return f"| {' | '.join(columns)} |"


def _ratio(found: Found, cell: Cell) -> str:
    result, dense = found.get(cell), found[DENSE]
    if result is None or dense is None:
        return "not run"
    return _shown(result["perplexity"] / dense["perplexity"])


def _shown(ratio: float) -> str:
    return f"{ratio:.3f}" if ratio < 100 else f"{ratio:.0f}"


def _costs(found: Found, name: str) -> list[str]:
    """Seconds, memory and the share removed at 20 %: the least of the seeds that were run."""
    runs = {}
    for percent in (20, 50):
        results = [found.get(claimed(name, percent, seed)) for seed in CLAIM_SEEDS]
        runs[percent] = [result for result in results if result is not None]
    seconds = [
        f"{min(result['seconds'] for result in run):.1f}" if run else "not run"
        for run in runs.values()
    ]
    if not runs[20]:
        return [*seconds, "not run", "not run"]
    peak = min(result["peak_mib"] for result in runs[20])
    return [*seconds, f"{peak:.0f}", f"{100 * runs[20][0]['sparsity']['decoder']:.2f} %"]


def _claims(found: Found) -> list[str]:
    """Mean and spread over calibration seeds of the rows that are compared."""
    lines = [_row(["claim", "sparsity", "mean (range)", "others"]), _row(["---"] * 4)]

    def spread(name: str, percent: int) -> str:
        dense = found[DENSE]
        runs = [found.get(claimed(name, percent, seed)) for seed in CLAIM_SEEDS]
        ratios = [r["perplexity"] / dense["perplexity"] for r in runs if r and dense]
        if len(ratios) < len(CLAIM_SEEDS):
            return "not run"
        mean, least, most = map(_shown, (statistics.mean(ratios), min(ratios), max(ratios)))
        return f"{mean} ({least} to {most})"

    for name, row in METHODS.items():
        for percent in (20, 50) if row.claims else ():
            others = "; ".join(f"{other} {spread(other, percent)}" for other in row.claims)
            lines.append(_row([name, f"{percent} %", spread(name, percent), others]))
    return lines


def _options(found: Found) -> list[str]:
    """What each row was asked for beside the protocol."""
    lines = ["options:"]
    for name, row in METHODS.items():
        result = found.get(claimed(name, 20, 0)) or found.get(Cell(name, 20))
        told = "not run" if result is None else json.dumps(result["options"])
        if row.by_percent:
            told += f"; at one sparsity alone: {json.dumps(row.by_percent)}"
        lines.append(f"- {name}: {told}")
    return lines


def _reached(found: Found) -> list[str]:
    """The sparsities that cells of a target have, and the commits that they were measured with."""
    lines = []
    for percent in (20, 50):
        results = [result for cell, result in found.items() if cell.percent == percent and result]
        shares = sorted(100 * result["sparsity"]["decoder"] for result in results)
        told = f"{shares[0]:.2f} % to {shares[-1]:.2f} %" if shares else "not run"
        lines.append(f"- removed where {percent} % were asked for: {told}")
    codes = sorted({result["code"] for result in found.values() if result})
    return [*lines, f"- commits: {', '.join(codes)}"]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["run", "table", "cell", "list"])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with text/")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_methods"))
    parser.add_argument("--judge", choices=["test", "validation"], default="test")
    parser.add_argument("--only", default="", help="regular expression of cells' names")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell after that")
    parser.add_argument("--name", default="", help="the cell to measure")
    given = parser.parse_args()
    if given.command == "run":
        run(given.data, given.out, given.judge, given.only, given.minutes)
    elif given.command == "table":
        print(table(given.data, given.out, given.judge))
    elif given.command == "list":
        print("\n".join(cell.name for cell in cells(MAIN)))
    else:
        from bench_process import measure  # torch takes seconds to import

        print(json.dumps(measure(named(given.name), given.data, given.judge)))


if __name__ == "__main__":
    main()
