"""Histograms of scores against counting unit by unit."""

from __future__ import annotations

import math
from typing import Any

import torch

from lit_prune.reporting.distribution import histograms
from lit_prune.structure.layout import LayerUnits, Layout, Widths


def widths(layers: int = 3) -> Widths:
    sizes = {"channel": 9, "group": 3, "query": 4, "value": 5}
    return Widths({"hidden": 12, "vocab": 7, "head_dim": 5}, [dict(sizes) for _ in range(layers)])


def counted(units: list[tuple[float, bool]], histogram: dict[str, Any]) -> None:
    """Hold that a histogram is what a loop over units finds."""
    edges = histogram["edges"]
    kept, removed, zeros = [0] * 40, [0] * 40, 0
    for value, stays in units:
        if math.isinf(value):
            continue
        if histogram["log10"]:
            if value == 0:
                zeros += 1
                continue
            value = math.log10(value)
        place = max((i for i in range(40) if edges[i] <= value), default=0)
        (kept if stays else removed)[place] += 1
    assert histogram == {
        "log10": histogram["log10"],
        "edges": edges,
        "kept": kept,
        "removed": removed,
        "zeros": zeros,
    }
    assert len(edges) == 41
    assert edges == sorted(edges)


def test_units_are_counted_by_axis_over_all_layers():
    torch.manual_seed(0)
    layout = Layout(
        widths(),
        torch.tensor([0, 2, 3, 11]),
        (
            LayerUnits(
                0, {"channel": torch.tensor([1, 5]), "query": torch.tensor([[0], [3], [2]])}
            ),
            LayerUnits(1, {"channel": torch.tensor([0, 1, 2, 3, 8])}),
            LayerUnits(2),
        ),
    )
    channel = {layer: torch.rand(9) ** 8 for layer in range(3)}
    channel[1][3] = channel[0][0] = 0.0
    query = {0: torch.rand(3, 4), 2: torch.rand(3, 4)}  # the middle layer is not scored
    hidden = torch.rand(12)
    found = histograms({"channel": channel, "query": query, "hidden": {0: hidden}}, layout)

    assert set(found) == {"channel", "query", "hidden"}
    stays = [{1, 5}, {0, 1, 2, 3, 8}, set(range(9))]
    pairs = [(float(channel[n][i]), i in stays[n]) for n in range(3) for i in range(9)]
    counted(pairs, found["channel"])
    assert found["channel"]["zeros"] == 2
    assert sum(found["channel"]["kept"]) == 2 + 5 + 9 - 1
    kept = {0: [{0}, {3}, {2}], 2: [set(range(4))] * 3}
    counted(
        [
            (float(query[n][g, i]), i in kept[n][g])
            for n in (0, 2)
            for g in range(3)
            for i in range(4)
        ],
        found["query"],
    )
    counted([(float(hidden[i]), i in {0, 2, 3, 11}) for i in range(12)], found["hidden"])


def test_negative_scores_have_no_logarithm():
    layout = Layout.full(widths(1)).replace_layer(0, {"group": torch.tensor([1, 2])})
    found = histograms({"group": {0: torch.tensor([-2.0, 0.0, 1.5])}}, layout)["group"]
    assert not found["log10"]
    counted([(-2.0, False), (0.0, True), (1.5, True)], found)
    assert found["edges"][0] == -2
    assert found["edges"][-1] == 1.5


def test_logarithms_and_units_that_always_stay():
    layout = Layout.full(widths(2)).replace_layer(0, {"group": torch.tensor([0])})
    values = {0: torch.tensor([3.0, -1.0, -4.0]), 1: torch.full((3,), math.inf)}
    found = histograms({"group": values}, layout, logarithms=True)["group"]
    assert found["log10"]
    assert sum(found["kept"]) == 1
    assert sum(found["removed"]) == 2
    assert math.isclose(found["edges"][-1], 3 / math.log(10))
    assert not histograms({"group": {1: values[1]}}, layout)


def test_equal_scores_and_a_layer_that_is_gone():
    layout = Layout(widths(2), None, (LayerUnits(1),))
    scores = {"channel": {0: torch.ones(9), 1: torch.ones(9)}}
    found = histograms(scores, layout)["channel"]
    assert sum(found["removed"]) == sum(found["kept"]) == 9
    assert found["edges"][0] < 0 < found["edges"][-1]
    none = histograms({"channel": {0: torch.zeros(9)}}, Layout.full(widths(1)))["channel"]
    assert none["zeros"] == 9
    assert sum(none["kept"]) == 0


def test_a_score_on_an_edge_belongs_to_the_bin_above():
    sizes = Widths({"hidden": 5}, [])
    values = [-20.0, -3.0, 0.0, 7.0, 20.0]
    layout = Layout(sizes, torch.tensor([1, 3]), ())
    found = histograms({"hidden": {0: torch.tensor(values)}}, layout)["hidden"]
    counted([(value, i in {1, 3}) for i, value in enumerate(values)], found)
    assert (found["kept"][17], found["removed"][20], found["removed"][39]) == (1, 1, 1)
