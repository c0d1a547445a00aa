"""The bench of the methods: what was not run is shown so, and protocols are not mixed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("bench_cells", "bench_methods"):
        sys.modules.pop(name, None)
    return importlib.import_module("bench_methods")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    for name in ("wikitext2-train-head.txt", "wikitext2-test.txt"):
        (folder / name).write_text(name)
    return folder.parent


def write(bench: Any, out: Path, data: Path, cell: Any, perplexity: float, **changed: Any) -> None:
    out.mkdir(exist_ok=True)
    result: dict[str, Any] = {
        "protocol": bench.protocol(data, "test") | changed,
        "code": "abc1234",
        "perplexity": perplexity,
    }
    if cell.method != "dense":
        asked = sys.modules["bench_cells"].asked(cell)
        result |= {"seconds": 12.0, "peak_mib": 34.0, "sparsity": {"decoder": 0.2}, "asked": asked}
        result["options"] = {"axes": ["channel"]}
    (out / f"{cell.name}.json").write_text(json.dumps(result))


def test_ratios_are_to_dense_and_missing_cells_are_not_run(bench: Any, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    write(bench, out, data, bench.DENSE, 20.0)
    write(bench, out, data, bench.Cell("fasp", 20, "own"), 30.0)
    lines = bench.table(data, out, "test").splitlines()
    (fasp,) = [line for line in lines if line.startswith("| fasp | 1.5")]
    assert fasp.split(" | ")[1:] == [
        *("1.500", "not run", "not run", "not run", "not run", "not run"),
        *("12", "34", "20.00 % |"),
    ]
    (flap,) = [line for line in lines if line.startswith("| flap |")]
    assert flap.count("not run") == 9
    assert lines[-3:] == [
        "- removed where 20 % were asked for: 20.00 % to 20.00 %",
        "- removed where 50 % were asked for: not run",
        "- commits: abc1234",
    ]


def test_a_claim_needs_all_seeds(bench: Any, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    write(bench, out, data, bench.DENSE, 10.0)
    for seed, value in enumerate((12.0, 13.0, 17.0)):
        write(bench, out, data, bench.claimed("fasp", 20, seed), value)
    for seed in (0, 1):
        write(bench, out, data, bench.claimed("flap", 20, seed), 15.0)
    text = bench.table(data, out, "test")
    (line,) = [x for x in text.splitlines() if x.startswith("| fasp | 20 % |")]
    assert "1.400 (1.200 to 1.700)" in line
    assert "flap not run" in line


@pytest.mark.parametrize("changed", [{"tokens": 1024}, {"torch": "1.0"}])
def test_another_protocol_is_refused(bench: Any, data: Path, tmp_path: Path, changed: Any):
    out = tmp_path / "out"
    write(bench, out, data, bench.DENSE, 20.0)
    write(bench, out, data, bench.Cell("fasp", 20, "own"), 30.0, **changed)
    with pytest.raises(SystemExit, match=rf"fasp_20_own.*{next(iter(changed))}"):
        bench.table(data, out, "test")


def test_other_options_are_refused(bench: Any, data: Path, tmp_path: Path, monkeypatch: Any):
    out, cell = tmp_path / "out", bench.Cell("fasp", 20, "own")
    write(bench, out, data, cell, 30.0)
    monkeypatch.setitem(bench.METHODS, "fasp", bench.METHODS["flap"])
    with pytest.raises(SystemExit, match="options"):
        bench.read(out, cell, bench.protocol(data, "test"))


def test_the_best_three_are_known_once_all_are(bench: Any, data: Path, tmp_path: Path):
    out, expected = tmp_path / "out", bench.protocol(data, "test")
    for number, name in enumerate(bench.MAIN):
        assert bench.best_of(out, expected) == []
        write(bench, out, data, bench.Cell(name, 50, "least_squares"), 100.0 - number)
    assert bench.best_of(out, expected) == bench.MAIN[::-1][:3]


def test_names_of_cells_are_distinct(bench: Any):
    cells = sys.modules["bench_cells"]
    found = cells.cells(bench.MAIN)
    assert len({cell.name for cell in found}) == len(found)
    assert all(cells.named(cell.name) == cell for cell in found)
