"""The bench of the methods: what was not run is shown so, and protocols are not mixed."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune import callbacks
from tests.tiny_fit import save_model, write_text

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("bench_cells", "bench_methods", "bench_process"):
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
        result |= {
            "seconds": 12.0 - cell.seed,
            "peak_mib": 34.0,
            "sparsity": {"decoder": 0.2},
            "asked": asked,
        }
        result["options"] = {"axes": ["channel"]}
    (out / f"{cell.name}.json").write_text(json.dumps(result))


def test_ratios_are_to_dense_and_missing_cells_are_not_run(bench: Any, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    write(bench, out, data, bench.DENSE, 20.0)
    write(bench, out, data, bench.Cell("wanda-sp", 20, "own"), 30.0)
    write(bench, out, data, bench.Cell("wanda-sp", 20, "own", seed=1), 31.0)
    lines = bench.table(data, out, "test").splitlines()
    (wanda,) = [line for line in lines if line.startswith("| wanda-sp | 1.5")]
    assert wanda.split(" | ")[1:] == [
        *("1.500", "not run", "not run", "not run", "not run", "not run"),
        *("11.0", "not run", "34", "20.00 % |"),
    ]
    (flap,) = [line for line in lines if line.startswith("| flap |")]
    assert flap.count("not run") == 10
    assert lines[-3:] == [
        "- removed where 20 % were asked for: 20.00 % to 20.00 %",
        "- removed where 50 % were asked for: not run",
        "- commits: abc1234",
    ]


def test_rows_aside_have_their_own_repair_alone(bench: Any, data: Path, tmp_path: Path):
    out = tmp_path / "out"
    write(bench, out, data, bench.DENSE, 20.0)
    write(bench, out, data, bench.Cell("flap-groups", 20), 30.0)
    lines = bench.table(data, out, "test").splitlines()
    (row,) = [line for line in lines if line.startswith("| flap-groups |")]
    assert row.split(" | ")[1:] == [
        *("1.500", "", "", "not run", "", "", "12.0", "not run", "34", "20.00 % |"),
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


def test_rows_can_be_made(bench: Any):
    cells = sys.modules["bench_cells"]
    for cell in cells.cells(bench.MAIN):
        if cell != bench.DENSE:
            getattr(callbacks, bench.METHODS[cell.method].callback)(**cells.asked(cell))


def test_options_of_one_sparsity_stay_with_it(bench: Any):
    cells = sys.modules["bench_cells"]
    assert cells.asked(bench.Cell("vib", 20))["mean_rate"] == 0.03
    assert "mean_rate" not in cells.asked(bench.Cell("vib", 50))


def test_names_that_are_none_are_refused(bench: Any, data: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="got 'wandasp'"):
        bench.run(data, tmp_path / "out", "test", "wandasp", 1.0)
    assert not (tmp_path / "out").exists()


def test_texts_that_are_missing_are_named(bench: Any, tmp_path: Path):
    with pytest.raises(SystemExit, match=r"expected wikitext2-train-head\.txt in"):
        bench.table(tmp_path, tmp_path / "out", "test")


def test_recovery_of_the_best_says_what_it_waits_for(
    bench: Any, data: Path, tmp_path: Path, capsys: Any
):
    bench.run(data, tmp_path / "out", "test", "^vib_50.*_recovered$", 1.0)
    assert "waits for all cells with least squares" in capsys.readouterr().err


class Driver:
    """Stands in for git and for the process of a cell."""

    def __init__(self, codes: list[str]) -> None:
        self.codes = codes
        self.threads: list[str] = []
        self.imported: list[str] = []

    def check_output(self, *_: Any, **__: Any) -> str:
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]

    def run(self, command: list[str], *, env: dict[str, str], **_: Any) -> Any:
        self.threads.append(env["OMP_NUM_THREADS"])
        self.imported.append(env["PYTHONPATH"])
        return SimpleNamespace(returncode=0, stdout=json.dumps({"perplexity": 20.0}), stderr="")


@pytest.mark.parametrize("codes", [["abc"], ["abc-dirty"], ["abc", "def"], ["abc", "abc-dirty"]])
def test_a_cell_is_of_one_state_of_the_code(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: Any, codes: list[str], capsys: Any
):
    first, driver, out = codes[0], Driver(list(codes)), tmp_path / "out"
    monkeypatch.setattr(bench, "subprocess", driver)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if len(codes) == 1:
        bench.run(data, out, "test", "^dense$", 1.0)
        assert json.loads((out / "dense.json").read_text())["code"] == first
        assert driver.threads == ["1"]
        assert driver.imported == [str(SCRIPTS.parent)]
        return
    with pytest.raises(SystemExit, match="1 cells failed"):
        bench.run(data, out, "test", "^dense$", 1.0)
    assert f"got {codes[0]} and then {codes[1]}" in capsys.readouterr().err
    assert not (out / "dense.json").exists()


def test_recovery_is_the_same_for_all_and_changes_nothing_before_it(
    bench: Any, tmp_path: Path, monkeypatch: Any
):
    """Also behind masks, which train on other windows and fewer a step."""
    process, cells = importlib.import_module("bench_process"), sys.modules["bench_cells"]
    text = tmp_path / "data" / "text"
    text.mkdir(parents=True)
    for name in ("wikitext2-train-head.txt", "wikitext2-test.txt"):
        shutil.copy(write_text(tmp_path / "made", 6000), text / name)
    small = {"LENGTH": 16, "WINDOW": 16, "TOKENS": 64, "STEPS": 3, "RANK": 2}
    for module, name in itertools.product((process, cells), small):
        monkeypatch.setattr(module, name, small[name])
    monkeypatch.setattr(process, "MODEL", save_model(tmp_path / "dense", "llama"))
    row, l2 = cells.METHODS["vib"], cells.METHODS["magnitude-l2"]
    masks = replace(row, options={**row.options, "steps": 4, "rate": 5.0})
    monkeypatch.setitem(cells.METHODS, "vib", masks)
    # its layers that stay whole are the embedded model's
    monkeypatch.setitem(cells.METHODS, "magnitude-l2", replace(l2, options={"norm": "l2"}))

    def trainer(callbacks: list[Any], **options: Any) -> Any:
        return Trainer(callbacks=[*callbacks, watch], enable_progress_bar=False, **options)

    monkeypatch.setattr(process, "Trainer", trainer)
    kept: dict[tuple[str, bool], Any] = {}
    recovered = []
    for method, before in (("vib", 4), ("magnitude-l2", 0)):
        for recovery in (False, True):
            watch = Seen()
            cell = cells.Cell(method, 20, "least_squares", recovery=recovery)
            process.measure(cell, tmp_path / "data", "test")
            kept[method, recovery] = watch.kept
            assert [len(rows) for rows in watch.batches[:before]] == [1] * before
        assert kept[method, False] == kept[method, True]
        recovered.append([rows.tolist() for rows in watch.batches[before:]])
        assert [len(rows) for rows in recovered[-1]] == [process.BATCH] * 3
    assert recovered[0] == recovered[1]


class Seen(Callback):
    """The model right after the cut, and the windows of each batch."""

    def __init__(self) -> None:
        self.kept: Any = None
        self.batches: list[Tensor] = []

    def on_after_cut(self, trainer: Any, pl_module: Any) -> None:
        weights = {name: p.tolist() for name, p in pl_module.model.named_parameters()}
        self.kept = (pl_module.layout.to_dict(), weights)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch["input_ids"])
