"""What the bench of the methods compares: rows, cells, and the protocol that they share."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL, DTYPE = "embedded:smollm2-135m-instruct", "bfloat16"
SAMPLES, LENGTH = 32, 512
WINDOW, TOKENS = 2048, 65_536
STEPS, BATCH, RANK, RATE = 100, 2, 32, 1e-3
CLAIM_SEEDS = (0, 1, 2)
BEST = 3

#: The first 4 of 30 layers and the last 2, whole, as LLM-Pruner has them.
ENDS = {"protected_layers": [0, 1, 2, 3, 28, 29]}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        callback: Class in `lit_prune.callbacks`.
        options: Its options, beside sparsity, axes and restoration.
        own: The method's own restoration, in the column without least squares.
        claims: Rows that it is said to beat.
        main: Whether it is a row of the table, or only of the claims.
        batch: Windows of a step before the cut.
        by_percent: Options of one sparsity alone.
    """

    callback: str
    options: dict[str, Any] = field(default_factory=dict)
    own: str = "none"
    claims: tuple[str, ...] = ()
    main: bool = True
    batch: int = BATCH
    by_percent: dict[int, dict[str, Any]] = field(default_factory=dict)


def _fusion(**options: Any) -> Method:
    return Method("AdaptiveFusionPruning", options, main=False)


def _cce(claims: tuple[str, ...] = (), **options: Any) -> Method:
    options = {"axes": ["query", "channel", "hidden"], **options}
    return Method("CoupledComponentPruning", options, claims=claims, main=False)


def _mini(criterion: str) -> Method:
    return Method("ZerothOrderPruning", {"criterion": criterion, "samples": SAMPLES}, main=False)


_FUSION = {"fisher_scale": "tokens", "mixing": "normalised"}
_BLOCKS = ["group", "channel"]
_SINGLE = ("fusion-vector", "fusion-element1", "fusion-element2", "fusion-mixed")

#: One row a method, on FFN channels unless its options say otherwise.
METHODS: dict[str, Method] = {
    "random": Method("RandomPruning"),
    "magnitude-l1": Method("MagnitudePruning", {"norm": "l1", **ENDS}),
    "magnitude-l2": Method("MagnitudePruning", {"norm": "l2", **ENDS}),
    "wanda-sp": Method("WandaPruning"),
    "flap": Method("FLAPPruning", own="bias"),
    "taylor-vector": Method("TaylorPruning", {"estimate": "vector", **ENDS}),
    "taylor-element1": Method("TaylorPruning", {"estimate": "element1", **ENDS}),
    "taylor-element2": Method("TaylorPruning", {"estimate": "element2", **ENDS}),
    "taylor-mixed": Method("TaylorPruning", {"estimate": "mixed", **ENDS}),
    "fasp": Method("FASPPruning", claims=("wanda-sp", "flap")),
    "fisher": Method("FisherPruning"),
    "fisher-iterated": Method("FisherPruning", {"iterations": 3}),
    "cce": Method("CoupledComponentPruning", claims=("random", "magnitude-l2")),
    "fusion": Method(
        "AdaptiveFusionPruning",
        _FUSION,
        own="unit_scales",
        claims=_SINGLE,
    ),
    "vib": Method(
        "VIBPruning",
        {"steps": 240, "rate": 0.17, "multiple": 0, "keep_best": False},
        claims=("flap", "wanda-sp"),
        batch=1,
        by_percent={20: {"mean_rate": 0.03}},
    ),
    "mini-llm": Method(
        "ZerothOrderPruning",
        {"samples": SAMPLES},
        claims=("mini-llm-wanda", "mini-llm-gradient", "mini-llm-magnitude"),
    ),
    # the scores alone, as those it is compared with
    "fusion-alone": Method("AdaptiveFusionPruning", _FUSION, claims=_SINGLE, main=False),
    "fusion-vector": _fusion(estimate="vector"),
    "fusion-element1": _fusion(estimate="element1"),
    "fusion-element2": _fusion(estimate="element2"),
    "fusion-mixed": _fusion(estimate="mixed", fisher_scale="tokens"),
    "mini-llm-wanda": _mini("wanda"),
    "mini-llm-magnitude": _mini("magnitude"),
    "mini-llm-gradient": _mini("gradient"),
    "cce-all": _cce(claims=("cce-all-random", "cce-all-l2")),
    "cce-all-random": _cce(criterion="random"),
    "cce-all-l2": _cce(criterion="l2"),
    # as their authors' tools cut
    "wanda-sp-groups": Method("WandaPruning", {"axes": _BLOCKS}, main=False),
    "flap-groups": Method("FLAPPruning", {"axes": _BLOCKS}, own="bias", main=False),
    "taylor-element1-groups": Method(
        "TaylorPruning", {"estimate": "element1", "axes": _BLOCKS, **ENDS}, main=False
    ),
}
MAIN = [name for name, row in METHODS.items() if row.main]
_COMPARED = {m for name, row in METHODS.items() if row.claims for m in (name, *row.claims)}
#: Rows of the table with the method's own repair alone.
ASIDE = [name for name in METHODS if name not in MAIN and name not in _COMPARED]


@dataclass(frozen=True)
class Cell:
    """One measurement; `dense` has no sparsity."""

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


DENSE = Cell("dense")


def claimed(method: str, percent: int, seed: int) -> Cell:
    """A cell that a claim is judged by; FASP's includes its least squares."""
    return Cell(method, percent, "least_squares" if method == "fasp" else "own", seed)


def recovered(method: str, percent: int) -> Cell:
    """A method's cell after recovery."""
    return Cell(method, percent, "least_squares", recovery=True)


def cells(best: list[str]) -> list[Cell]:
    """All of them, the most telling first.

    Args:
        best: Methods that are recovered at 50 %, as far as they are known yet.
    """
    found = [DENSE]
    for percent in (20, 50):
        for restoration in ("own", "least_squares"):
            found += [Cell(name, percent, restoration) for name in MAIN]
    found += [recovered(name, 20) for name in MAIN]
    found += [recovered(name, 50) for name in best]
    for percent in (20, 50):
        found += [Cell(name, percent) for name in ASIDE]
        for seed in CLAIM_SEEDS:
            found += [claimed(m, percent, seed) for m in METHODS if m in _COMPARED]
    return list(dict.fromkeys(found))


def named(name: str) -> Cell:
    """The cell of a name.

    Raises:
        SystemExit: There is none.
    """
    for cell in cells(MAIN):
        if cell.name == name:
            return cell
    raise SystemExit(f"expected the name of a cell (see list), got {name!r}")


def protocol(data: Path, judge: str) -> dict[str, Any]:
    """What every cell of a table must share.

    Raises:
        SystemExit: The folder has not the texts.
    """
    names = ("wikitext2-train-head.txt", "wikitext2-test.txt")
    for name in names:
        if not (data / "text" / name).is_file():
            raise SystemExit(f"expected {name} in {data}/text (--data), got no file")
    digests = {
        name: hashlib.sha256((data / "text" / name).read_bytes()).hexdigest()[:16] for name in names
    }
    return {
        "model": MODEL,
        "dtype": DTYPE,
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


def read(out: Path, cell: Cell, expected: dict[str, Any]) -> dict[str, Any] | None:
    """A cell's result, if it was run.

    Raises:
        SystemExit: It was run under another protocol, or with other options.
    """
    path = out / f"{cell.name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key in expected if found["protocol"].get(key) != expected[key]]
    if cell != DENSE and found["asked"] != asked(cell):
        other.append("options")
    if other:
        raise SystemExit(
            f"expected cells of one protocol, got {path.name} with another {', '.join(other)}; "
            "move it away or give another --out"
        )
    return found


def asked(cell: Cell) -> dict[str, Any]:
    """A cell's options of its callback."""
    row = METHODS[cell.method]
    return {
        "sparsity": cell.percent / 100,
        "axes": ["channel"],
        "restoration": row.own if cell.restoration == "own" else cell.restoration,
        "samples": SAMPLES,
        "length": LENGTH,
        "seed": cell.seed,
        **row.options,
        **row.by_percent.get(cell.percent, {}),
    }
