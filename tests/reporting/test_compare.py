"""Models side by side: every cell from the records, figures of one protocol in a row."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lit_prune.reporting import plots
from lit_prune.reporting.compare import NOTHING, columns, markdown, notes, render, rows
from lit_prune.reporting.comparison_page import (
    power_of_two,
    sizes_plot,
    widths_plot,
    write_comparison,
)


def stat(median: float) -> dict[str, float]:
    return {"median": median, "low": median - 1, "high": median + 1}


def entry(source: str, parameters: int, value: float, faster: bool | None) -> dict[str, Any]:
    timed = {
        "tokens_per_second": stat(100.0),
        "latency_ms": stat(20.0),
        "ratio": None if faster is None else stat(1.25),
        "faster": faster,
        "slower": None if faster is None else False,
    }
    return {
        "source": source,
        "digest": source,
        "cost": {
            "parameters": parameters,
            "decoder_parameters": parameters // 2,
            "checkpoint_bytes": None,
            "weight_bytes": 2 * parameters,
            "dtype": "bfloat16",
            "cache_bytes_per_token": 64,
            "macs_per_token": {"64": 10**7, "2048": 2 * 10**7},
            "macs_of_sequence": {"64": 10**9, "2048": 10**11},
            "widths": {"channel": [96, 64]},
        },
        "perplexity": [
            {
                **{"value": value, "ratio": None, "text": "t", "split": "test", "digest": "d"},
                **{"window": 128, "stride": 128, "tokens": 1280, "level": "token", "bos": False},
                "dtype": "float32",
            }
        ],
        "tasks": {
            "protocol": {"harness": "lm-eval 0", "limit": 4, "data": "hub"},
            "tasks": {
                "piqa": {"acc": 0.5, "acc_stderr": 0.1, "fewshot": 0, "items": 4},
                "mmlu": {"not_run": "no data"},
            },
            "averages": {"acc": {"value": 0.5, "tasks": ["piqa"]}},
        },
        "speed": {
            "protocol": {"prompt": 8, "new_tokens": 2, "rounds": 5, "device": "cpu"},
            "batches": {"1": {"prefill": timed, "decode": timed}, "8": {"not_run": "no memory"}},
            "memory": {"peak_bytes": 5_000_000, "baseline_bytes": 1_000_000},
        },
    }


@pytest.fixture
def record() -> dict[str, Any]:
    model = entry("a", 900, 30.0, True)
    model["perplexity"][0]["ratio"] = 1.5
    return {"model": model, "dense": entry("d", 1000, 20.0, None), "warnings": [], "versions": {}}


def cells(records: Any) -> dict[str, list[str]]:
    return {row.label: row.cells for row in rows([each for _, each in columns(records)])}


def test_each_model_is_a_column_and_a_dense_one_only_once(record: dict[str, Any]) -> None:
    names = [name for name, _ in columns([("x", record), ("y", copy.deepcopy(record))])]
    assert names == ["d", "x", "y"]
    other = copy.deepcopy(record)
    other["dense"]["digest"] = "of another dtype"
    for each in (record, other):
        each["dense"]["files"] = "f"
    assert [name for name, _ in columns([("x", record), ("y", other)])] == ["d", "x", "y"]
    other["dense"]["files"] = "of other weights"
    assert [name for name, _ in columns([("x", record), ("y", other)])] == ["d", "x", "d", "y"]


def test_cells_are_the_records(record: dict[str, Any]) -> None:
    found = cells([("x", record)])
    assert found["parameters"] == ["1,000", "900"]
    assert found["t (test), windows of 128, 1,280 tokens, float32"] == ["20.00", "30.00 (1.500 x)"]
    assert found["piqa, 0-shot, 4 items"] == ["acc 0.5000 ± 0.1000"] * 2
    assert found["mmlu"] == ["not run"] * 2
    assert found["average, acc (piqa), 0-shot"] == ["0.5000"] * 2
    assert found["MACs of a token, 2,048 in context, millions"] == ["20.0"] * 2
    assert "checkpoint, MB" not in found  # of none is it known
    speed = found["prefill, batch 1, tokens/s"]
    assert speed == ["100 (99 to 101)", "100 (99 to 101)\n1.25 (0.25 to 2.25) x"]
    assert found["decode, batch 8, tokens/s"] == ["not run"] * 2
    assert found["peak memory beside the libraries, batch 1, MB"] == ["4"] * 2


def test_no_speed_up_is_claimed_where_ranges_overlap(record: dict[str, Any]) -> None:
    timed = record["model"]["speed"]["batches"]["1"]["decode"]
    timed["faster"] = False
    assert cells([("x", record)])["decode, batch 1, tokens/s"][1].endswith("x, ranges overlap")
    timed["slower"] = True
    assert cells([("x", record)])["decode, batch 1, tokens/s"][1].endswith("x")
    del timed["slower"]  # an earlier record
    timed["ratio"] = {"median": 0.5, "low": 0.4, "high": 0.6}
    assert cells([("x", record)])["decode, batch 1, tokens/s"][1].endswith("x")


@pytest.mark.parametrize(("key", "value"), [("window", 64), ("dtype", "bfloat16"), ("digest", "e")])
def test_other_protocols_are_other_rows(record: dict[str, Any], key: str, value: Any) -> None:
    record["model"]["perplexity"][0][key] = value
    found = [row for row in rows([record["dense"], record["model"]]) if row.section == "perplexity"]
    assert [row.cells for row in found] == [["20.00", NOTHING], [NOTHING, "30.00 (1.500 x)"]]
    assert len({row.label for row in found}) == 2


def test_tasks_and_speeds_of_other_protocols_are_apart(record: dict[str, Any]) -> None:
    record["model"]["tasks"]["protocol"]["limit"] = 8
    record["model"]["speed"]["protocol"]["device"] = "cuda"
    found = rows([record["dense"], record["model"]])
    for section in ("tasks", "speed"):
        own = [row for row in found if row.section.startswith(section)]
        assert len({row.section for row in own}) == 2
        assert all(NOTHING in row.cells for row in own)


@pytest.mark.parametrize(
    ("part", "value"), [("fewshot", 5), ("version", 2), ("digest", "e"), ("items", 100)]
)
def test_other_items_of_a_task_are_other_rows(
    record: dict[str, Any], part: str, value: Any
) -> None:
    record["model"]["tasks"]["tasks"]["piqa"][part] = value
    found = rows([record["dense"], record["model"]])
    own = [row for row in found if row.label.startswith(("piqa", "average"))]
    assert [row.cells.count(NOTHING) for row in own] == [1] * 4
    assert len({row.label for row in own}) == 4


def test_averages_of_other_tasks_are_other_rows(record: dict[str, Any]) -> None:
    measured = record["model"]["tasks"]
    measured["tasks"]["boolq"] = measured["tasks"]["piqa"]
    measured["averages"]["acc"]["tasks"] = ["piqa", "boolq"]
    measured["averages"]["papers"] = {"not_run": "hellaswag not run"}
    found = cells([("x", record)])
    assert found["average, acc (piqa), 0-shot"] == ["0.5000", NOTHING]
    assert found["average, acc (piqa, boolq), 0-shot"] == [NOTHING, "0.5000"]
    assert not any("papers" in label for label in found)


def test_what_was_not_run_stands_beside_what_was(record: dict[str, Any]) -> None:
    record["model"]["tasks"]["tasks"]["piqa"] = {"not_run": "no file"}
    assert cells([("x", record)])["piqa, 0-shot, 4 items"] == ["acc 0.5000 ± 0.1000", "not run"]
    record["warnings"] = ["w"]
    assert notes([("x", record)]) == [
        "w",
        "not run with d, x: mmlu (no data)",
        "not run with d, x: batch 8 (no memory)",
        "not run with x: piqa (no file)",
    ]


def test_a_dense_model_has_the_figures_of_all_records(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    for each in (other["model"], other["dense"]):
        each["perplexity"][0] |= {"window": 64, "stride": 64, "value": 40.0, "ratio": None}
        each["tasks"]["tasks"]["piqa"]["fewshot"] = 5
        each["speed"]["protocol"]["device"] = "cuda"
        each["cost"] |= {"dtype": "float32", "weight_bytes": 4_000_000}
    records = [("x", record), ("y", other)]
    found = cells(records)
    assert found["t (test), windows of 64, 1,280 tokens, float32"][::2] == ["40.00"] * 2
    assert found["piqa, 5-shot, 4 items"][::2] == ["acc 0.5000 ± 0.1000"] * 2
    assert found["weights in memory, MB, float32"] == ["4.0", NOTHING, "4.0"]
    sections = {row.section: row.cells for row in rows([each for _, each in columns(records)])}
    timed = [found for section, found in sections.items() if section.startswith("speed")]
    assert [each[0] for each in timed] == ["4", "4"]
    assert not any("several times" in note for note in notes(records))


def test_a_dense_model_timed_twice_has_its_first_speed(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    records = [("x", record), ("y", other)]
    assert not any("several times" in note for note in notes(records))  # copies of one session
    other["dense"]["speed"]["batches"]["1"]["decode"]["tokens_per_second"] = stat(500.0)
    assert cells(records)["decode, batch 1, tokens/s"][0] == "100 (99 to 101)"
    assert any("several times" in note for note in notes(records))


def test_dense_models_without_a_digest_are_not_taken_for_one(record: dict[str, Any]) -> None:
    record["dense"]["digest"] = None
    other = copy.deepcopy(record)
    assert [name for name, _ in columns([("x", record), ("y", other)])] == ["d", "x", "d", "y"]


def test_bytes_of_other_dtypes_are_other_rows(record: dict[str, Any]) -> None:
    record["model"]["cost"]["dtype"] = "float32"
    found = cells([("x", record)])
    for name in ("weights in memory, MB", "KV cache, bytes of a token"):
        assert found[f"{name}, bfloat16"][1] == found[f"{name}, float32"][0] == NOTHING


def test_plots_keep_protocols_apart(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    for name in ("perplexity_against_parameters", "latency_against_multiple"):
        monkeypatch.setattr(plots, name, lambda points: drawn.append(points) or "svg")
    other = copy.deepcopy(record)
    for each in (other["model"], other["dense"]):
        each["perplexity"][0]["digest"] = "of another text"
        each["speed"]["protocol"]["device"] = "cuda"
    named = columns([("x", record), ("y", other)])
    assert sizes_plot(named) == widths_plot(named, "decode") == "svg"
    assert [len({point["protocol"] for point in drawn[0]}), len(drawn[0])] == [2, 4]
    assert [point["name"] for point in drawn[1]] == [
        *["batch 1, device cpu"] * 2,
        *["batch 1, device cuda"] * 2,
    ]
    other["model"]["speed"]["protocol"]["device"] = "tpu"  # only one model is timed so
    assert widths_plot(named[::2], "decode") is None


def test_names_are_no_markup(record: dict[str, Any]) -> None:
    record["model"]["perplexity"][0]["text"] = "[red]text[/red]"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render(["d", "run[/x][bold]"], rows([record["dense"], record["model"]])))
    text = console.export_text()
    assert "run[/x][bold]" in text
    assert "[red]text[/red] (test)" in text


def test_markdown_and_terminal_say_the_same(record: dict[str, Any]) -> None:
    found = rows([record["dense"], record["model"]])
    text = markdown(["d", "a|b"], found)
    assert "| perplexity: t (test), windows of 128, 1,280 tokens, float32 | 20.00 |" in text
    assert "a\\|b" in text.splitlines()[0]
    assert all(line.startswith("|") and line.endswith("|") for line in text.splitlines())
    table = render(["d", "a"], found)
    assert table.row_count == len(found) + len({row.section for row in found})


def test_a_page_of_its_own(record: dict[str, Any], tmp_path: Path) -> None:
    record["warnings"] = ["<script>alert(1)</script>"]
    write_comparison([("<b>x", record)], tmp_path / "sub/page.html")
    page = (tmp_path / "sub/page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "mmlu (no data)" in page
    assert "&lt;b&gt;x" in page
    for row in rows([record["dense"], record["model"]]):
        for cell in row.cells:
            assert f">{cell}</td>" in page
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)


def test_powers_of_two() -> None:
    assert [power_of_two(widths) for widths in ([96, 64], [7, 8], [256, 512], [1126])] == [
        *(32, 1, 256, 2)
    ]
