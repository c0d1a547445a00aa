"""`compare`: what is printed, and reports of fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_prune.cli.compare import _add_report, print_comparison
from tests.reporting.made import full_report


def record() -> dict[str, Any]:
    entry = {"source": "m", "digest": None, "cost": {"parameters": 5}, "perplexity": []}
    return {"model": entry, "dense": None, "versions": {}, "warnings": []}


def of_report(folder: Path, *models: str) -> dict[str, Any]:
    report = full_report()
    report["models"] = {name: report["models"][name] for name in models}
    (folder / "report.json").write_text(json.dumps(report))
    found = record()
    _add_report(found, folder / "report.json")
    return found


@pytest.mark.parametrize(
    ("models", "values"),
    [
        (["dense"], []),  # nothing was cut
        (["dense", "pruned"], [26.5678]),
        (["dense", "pruned", "recovered"], [22.3456]),
    ],
)
def test_a_report_tells_of_the_last_model(
    tmp_path: Path, models: list[str], values: list[float]
) -> None:
    found = of_report(tmp_path, *models)
    assert [each["value"] for each in found["model"]["perplexity"]] == values
    assert found["dense"]["perplexity"][0]["value"] == 20.1234
    assert found["dense"]["cost"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["table", "markdown"])
def test_why_something_was_not_run_stands_below(
    form: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = record()
    found["model"]["tasks"] = {"protocol": {}, "tasks": {"mmlu": {"not_run": "no [data]"}}}
    print_comparison([("a", found)], form)
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.endswith("note: not run with a: mmlu (no [data])")
