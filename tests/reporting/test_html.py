"""report.html: only the report's numbers, nothing that runs or asks for something."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lit_prune.reporting import html
from lit_prune.reporting.html import render, write_html
from lit_prune.reporting.report import (
    COLUMNS,
    MODELS,
    load_lines,
    speed_entry,
    table_rows,
    write_report,
)
from tests.reporting.made import entry, full_report

_VOID = {"meta", "link", "br", "path", "use", "input"}


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch):
    """Draw nothing, which takes most of the time."""
    monkeypatch.setattr(html, "_plots", lambda report: [])


class Page(HTMLParser):
    """Cells of the tables by the section they stand in, visible text, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self._open, self._section, self._cell = "", [], "", False
        self.feed(text)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in {"section", "details", "div"}:
            self._section = dict(attrs).get("id") or self._section
        if tag == "tr":
            self.rows.setdefault(self._section, []).append([])
        if tag in {"td", "th"}:
            self.rows[self._section][-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if self._open and self._open[-1] in {"td", "th"}:
            self.rows[self._section][-1][-1] += data


@pytest.mark.usefixtures("no_plots")
def test_every_number_of_the_table_is_the_reports():
    report = full_report()
    rows = Page(render(report)).rows["results"]
    assert rows[0] == ["", *MODELS]
    columns = list(zip(*table_rows(report), strict=True))
    assert rows[1:] == [[COLUMNS[i], *columns[i]] for i in range(1, len(COLUMNS))]
    assert rows[1] == ["perplexity", "20.12", "26.57", "22.35"]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(
    ("path", "value", "shown"),
    [
        (["models", "pruned", "perplexity"], 98.765, "98.77"),
        (["models", "recovered", "parameters"], 45_678_901, "45,678,901"),
        (["models", "dense", "bytes"], 987_650_000, "987.6"),
        (["models", "pruned", "tokens_per_second"], 4321.4, "4,321"),
        (["sparsity", "decoder"], 0.34567, "34.57%"),
        (["sparsity", "target"], 0.31, "31.00%"),
        (["protocol", "tokens"], 76_543, "76,543 tokens"),
        (["seconds", "recover"], 1234.56, "1,234.6 s"),
        (["seed"], 90210, "90210"),
        (["layers", "channel", "kept", 1], 1013, "1,013 of 1,536"),
        (
            ["findings", "tasks", "dense", "tasks", "piqa", "acc"],
            0.71234,
            "0.7123 ±\N{NO-BREAK SPACE}0.0123",
        ),
        (["options", "sparsity"], 0.3125, "31.25%"),
        (["generations", 0, "pruned"], "of of of", "of of of"),
        (["versions", "torch"], "9.8.7", "9.8.7"),
    ],
)
def test_the_page_shows_what_the_report_says(path: list[Any], value: Any, shown: str):
    report = full_report()
    place: Any = report
    for key in path[:-1]:
        place = place[key]
    before = copy.deepcopy(report)
    place[path[-1]] = value
    if path == ["options", "sparsity"]:
        report["sparsity"]["target"] = value  # an option of this name is the target
    assert shown in Page(render(report)).text
    assert shown not in Page(render(before)).text


def test_scores_of_zero_are_told_apart():
    assert "Scores of channel, 5 of them 0 and not shown" in Page(render(full_report())).text


@pytest.mark.usefixtures("no_plots")
def test_tables_of_tasks_and_widths():
    page = Page(render(full_report()))
    assert page.rows["tasks"] == [
        ["task", "measure", "dense", "recovered"],
        ["piqa", "acc", "0.6543 ±\N{NO-BREAK SPACE}0.0123", "0.5432 ±\N{NO-BREAK SPACE}0.0123"],
        ["piqa", "acc_norm", f"{0.6543 / 2:.4f}", f"{0.5432 / 2:.4f}"],
        ["average", "acc (piqa)", "0.6543", "0.5432"],
    ]
    assert "mmlu: not run (no few-shot split)" in page.text
    assert page.rows["layers"] == [
        ["layer", "channel", "group"],
        ["0", "1,100 of 1,536", "3"],
        ["1", "1,152 of 1,536", "3"],
        ["2", "1,536", "3"],
    ]
    assert "hidden: 512 of 576" in page.text


def test_what_users_and_models_write_is_text():
    evil = "<script>alert('1')</script>\"&<b onclick=x>"
    report = full_report(
        method=evil,
        pretrained=evil,
        generations=[{"prompt": evil, "dense": evil, "pruned": evil, "recovered": evil}],
        config={evil: evil},
        warnings=[evil],
        options={evil: evil},
        seconds={evil: 1.0},
        curves={f"{evil}/loss": [[0, 1.0]], evil: [[0, 1.0]]},
        layers={evil: {"dense": [2], "kept": [1]}},
    )
    report["protocol"]["text"] = report["versions"]["torch"] = evil
    histogram = report["findings"]["scores"]["channel"]
    report["findings"] = {
        "scores": {evil: histogram},
        "tasks": {evil: {"tasks": {evil: {"acc": 1.0, "not_run": evil}}, "protocol": {evil: evil}}},
    }
    text = render(report)
    page = Page(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("b") == Page(render(full_report())).tags.count("b")
    assert page.text.count("alert('1')") > 15


def test_nothing_is_asked_for():
    text = render(full_report())
    assert not re.findall(r"(?:https?:)?//\S*", text)
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    page = Page(text)
    assert {"script", "img", "iframe", "object", "embed"}.isdisjoint(page.tags)
    addresses = [v or "" for name, v in page.attributes if name in {"src", "href", "xlink:href"}]
    assert all(address.startswith(("#", "data:,")) for address in addresses)


def test_ids_are_unique_and_what_they_point_to_is_there():
    text = render(full_report())
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {v[1:] for name, v in page.attributes if name == "href" and v and v.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used
    assert used <= set(ids)


def test_the_same_report_gives_the_same_bytes(tmp_path: Path):
    report = full_report(options={"axes": ("channel", "group"), "ratio": math.inf})
    report["seconds"]["recover"] = math.nan
    write_html(report, tmp_path / "new" / "a.html")
    write_report(report, tmp_path / "report.json")
    loaded = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    write_html(loaded, tmp_path / "b.html")
    assert (tmp_path / "new" / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert "seconds.recover is nan" in (tmp_path / "b.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("no_plots")
def test_it_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.html"
    write_html(full_report(), path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_html(full_report(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name", ["layers", "curves", "findings", "generations", "config", "seed", "pretrained", "stock"]
)
def test_a_part_may_be_missing_or_empty(name: str, request: pytest.FixtureRequest):
    if name not in {"layers", "curves", "findings"}:
        request.getfixturevalue("no_plots")
    report = full_report()
    whole = render(report)
    report[name] = None
    without = render(report)
    assert Page(without).rows["results"] == Page(whole).rows["results"]
    del report[name]
    assert render(report) == without
    assert without != whole


def test_a_run_that_only_cut_and_one_without_figures():
    nothing: dict[str, Any] = dict.fromkeys(
        ("layers", "curves", "findings", "generations", "config", "seed", "pretrained", "stock")
    )
    report = full_report(**nothing, seconds={}, warnings=[], options=None)
    del report["models"]["recovered"]
    report["models"]["pruned"] = entry(math.nan, 5, None)
    page = Page(render(report))
    assert page.rows["results"][1] == ["perplexity", "20.12", "-", "not run"]
    assert "models.pruned.perplexity is nan" in page.text
    del report["models"]["pruned"], report["models"]["dense"]
    assert [row[1:] for row in Page(render(report)).rows["results"]][1] == ["not run"] * 3


@pytest.mark.usefixtures("no_plots")
def test_it_says_how_to_load_the_result():
    for stock in (True, False):
        lines = load_lines("pruned", stock=stock)
        assert lines in Page(render(full_report(stock=stock))).text


@pytest.mark.usefixtures("no_plots")
def test_local_paths_stay_out():
    report = full_report(
        pretrained="/home/someone/secret/model", config={"data": {"train": "/home/someone/t.txt"}}
    )
    report["protocol"]["text"] = "/home/someone/x.txt"
    text = render(report)
    assert "someone" not in text
    assert {"x.txt", "t.txt"} <= set(re.findall(r"\w+\.txt", text))


@pytest.mark.usefixtures("no_plots")
def test_what_models_write_is_not_cut_like_a_path():
    written = {
        "prompt": "/etc/hosts and so on",
        "dense": "/usr/bin/env python",
        "pruned": "~/a b/c",
    }
    text = render(full_report(generations=[written]))
    assert all(part in text for part in written.values())


@pytest.mark.usefixtures("no_plots")
def test_averages_of_other_tasks_are_other_rows():
    report = full_report()
    report["findings"]["tasks"]["dense"]["averages"] = {
        "acc": {"value": 0.25, "tasks": ["piqa", "boolq"]},
        "papers": {"not_run": "boolq not run"},
    }
    assert Page(render(report)).rows["tasks"][3:] == [
        ["average", "acc (piqa, boolq)", "0.2500", "-"],
        ["average", "acc (piqa)", "-", "0.5432"],
    ]


@pytest.mark.usefixtures("no_plots")
def test_options_read_like_words():
    text = render(full_report())
    for name, value in {"smoothing": "no", "multiple": "0", "axes": "channel"}.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in text


@pytest.mark.parametrize(
    ("speeds", "note"), [([90.0, 110.0], "; ranges overlap"), ([120.0, 130.0], "")]
)
def test_a_speed_up_is_not_claimed_where_rounds_overlap(speeds: list[float], note: str) -> None:
    report = full_report()
    for name, each in (("dense", [80.0, 100.0]), ("pruned", speeds), ("recovered", speeds)):
        report["models"][name] |= speed_entry(each)
    assert f"<span>dense 90{note}</span>" in render(report)
