"""Plots: well-formed, readable without colours of their own, the same each time."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from lit_prune.reporting import plots
from lit_prune.reporting.svg import figure, inline
from tests.reporting.made import EDGES

HISTOGRAM: dict[str, Any] = {
    "log10": True,
    "edges": EDGES,
    "kept": [0] * 20 + [3] * 20,
    "removed": [2] * 20 + [0] * 20,
    "zeros": 1,
}
LAYERS = {
    "channel": {"dense": [40, 40, 40, 40], "kept": [40, 30, 20, 10]},
    "group": {"dense": [2, 2, 2, 2], "kept": [2, 2, 2, 2]},
    "hidden": {"dense": [64], "kept": [48]},
}
LINES = {"train/a_loss": [[0, 3.0], [5, None], [10, 2.0]], "train/b_loss": [[11, 4.0]]}
PARAMETERS = [
    {"name": "dense $\\alpha$", "parameters": 2_000_000, "perplexity": 20.0, "protocol": "2048"},
    {"name": "half", "parameters": 1_000_000, "perplexity": 30.0, "protocol": "2048"},
    {"name": "other", "parameters": 1_500_000, "perplexity": 40.0, "protocol": "128"},
    {"name": "none", "parameters": 1_500_000, "perplexity": None, "protocol": "128"},
]
LATENCY = [
    {"name": "decode", "multiple": m, "latency_ms": v, "low": v - 1, "high": v + 2}
    for m, v in [(64, 9.0), (1, 12.0), (8, 11.0)]
]
DRAWN: dict[str, Callable[[], str | None]] = {
    "widths": lambda: plots.width_heat_map(LAYERS),
    "scores": lambda: plots.score_histogram("channel", HISTOGRAM),
    "curves": lambda: plots.curves("Loss", "Loss", LINES),
    "bars": lambda: plots.perplexity_bars({"dense": 12.344, "pruned": 20.0}),
    "parameters": lambda: plots.perplexity_against_parameters(PARAMETERS),
    "latency": lambda: plots.latency_against_multiple(LATENCY),
    "nothing": lambda: plots.perplexity_against_parameters([]),
}


def texts(svg: str) -> list[str]:
    return [(e.text or "").strip() for e in ElementTree.fromstring(svg).iter("text")]


@pytest.mark.parametrize("name", DRAWN)
def test_each_is_whole_accessible_and_the_same_again(name: str):
    svg = DRAWN[name]()
    assert svg is not None
    root = ElementTree.fromstring(svg)  # well-formed
    title = root.find("title")
    assert title is not None
    assert root.get("aria-label") == title.text
    assert root.get("role") == "img"
    assert svg == DRAWN[name]()
    assert "http" not in svg
    assert "image" not in {element.tag for element in root.iter()}
    assert not re.search(r"#010[0-9]", svg), "a colour that only stands for the page's"
    assert "font-family" not in svg
    box = [float(number) for number in (root.get("viewBox") or "").split()]
    assert box[2] < 350
    for element in root.iter("text"):
        assert -1 <= float(element.get("y", 0)) <= box[3] + 1


def test_heat_map_has_a_cell_for_each_layer_of_what_was_cut():
    svg = plots.width_heat_map(LAYERS)
    assert svg is not None
    shown = texts(svg)
    assert {"channel", "10 to 40", "of 40", "hidden", "48", "of 64", "100%"} <= set(shown)
    assert "group" not in shown
    mesh = re.search(r'id="widths-QuadMesh_1">(.*?)</g>', svg)
    assert mesh is not None
    colors = re.findall(r"fill: (#\w+)", mesh[1])
    assert len(colors) == 2 * 4
    assert len(set(colors[:4])) == 4
    assert len(set(colors[4:])) == 1
    whole = {axis: {**widths, "kept": widths["dense"]} for axis, widths in LAYERS.items()}
    assert plots.width_heat_map(whole) is None
    assert plots.width_heat_map({}) is None


def test_histogram_stands_kept_on_removed():
    shown = texts(plots.score_histogram("channel", HISTOGRAM))
    assert {"kept", "removed", "units", "log₁₀ of the score"} <= set(shown)
    linear = {**HISTOGRAM, "log10": False}
    assert "score" in texts(plots.score_histogram("channel", linear))


def test_curves_leave_out_what_is_no_number():
    svg = plots.curves("Loss", "Loss", LINES)
    assert {"train/a_loss", "train/b_loss", "optimizer step"} <= set(texts(svg))
    assert "nan" not in svg.lower()
    wide = plots.curves("x", "x", {"a": [[0, 1.0], [1, 1000.0]]})
    assert {"1", "10", "100", "1000"} <= set(texts(wide))
    share = plots.curves("x", "x", {"masks/sparsity": [[0, 0.0], [1, 0.2]]}, percent=True)
    assert any(text.endswith("%") for text in texts(share))


def test_bars_carry_their_numbers():
    assert {"12.34", "20.00", "dense", "pruned"} <= set(texts(DRAWN["bars"]() or ""))


def test_comparisons_name_their_points_and_protocols():
    shown = texts(plots.perplexity_against_parameters(PARAMETERS))
    assert {"dense $\\alpha$", "half", "other", "2048", "128"} <= set(shown)
    assert "none" not in shown
    shown = texts(plots.latency_against_multiple(LATENCY))
    assert shown[:3] == ["1", "8", "64"]
    assert "decode" in shown


def test_text_is_escaped():
    evil = "<b>&\"'</b>"
    for svg in (
        plots.curves(evil, evil, {evil: [[0, 1.0]]}),
        plots.score_histogram(evil, HISTOGRAM),
        plots.perplexity_against_parameters([{**PARAMETERS[0], "name": evil, "protocol": evil}]),
    ):
        assert "<b>" not in svg
        root = ElementTree.fromstring(svg)
        assert evil in [
            *texts(svg),
            (root.get("aria-label") or "")[len("Scores of ") :][: len(evil)],
        ]


def test_ids_of_two_plots_differ():
    with figure() as one:
        one.subplots().plot([1, 2])
        first, second = inline(one, "a", "t"), inline(one, "b", "t")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert ids[0].isdisjoint(ids[1])


def test_the_process_settings_and_pyplot_are_left_alone():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 40, "axes.grid": False}):
        own = plots.perplexity_bars({"dense": 12.344, "pruned": 20.0})
        assert matplotlib.rcParams["font.size"] == 40
    assert own == DRAWN["bars"]()
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sys; from lit_prune.reporting import plots; plots.perplexity_bars({'a': 1.0});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_dense_run_with_one_perplexity_that_is_infinite():
    points = [{**PARAMETERS[0], "perplexity": math.inf}]
    assert "dense" not in " ".join(texts(plots.perplexity_against_parameters(points)))
