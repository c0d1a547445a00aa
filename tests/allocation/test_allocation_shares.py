"""Layers that give different shares, and what an axis costs in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_prune.allocation.plan import MOST, Axis, axes_of, uniform
from lit_prune.errors import UserError
from lit_prune.structure import Layout, Structure, cut
from lit_prune.structure.counting import count, count_actual, unique_labels
from lit_prune.structure.layout import Widths
from tests.structure.layouts import cuttable
from tests.structure.tiny import tiny_config, tiny_model

_STRUCTURE, _MODEL = Structure.of_config(tiny_config("llama"))
LABELS = unique_labels(_MODEL, _STRUCTURE)
#: Parameters of a channel: gate, up, down and two biases.
CHANNEL = 3 * 36 + 2


def widths_of(*channels: int, group: int = 2) -> Widths:
    layers = [{"channel": n, "group": group, "query": 3, "value": 8} for n in channels]
    return Widths(_STRUCTURE.widths.shared, layers)


def decoder(widths: Widths) -> int:
    return count(LABELS, widths, decoder=True)


def filled(goal: float, shares: list[float], sizes: list[int]) -> list[float]:
    """Units of each layer in proportion to its share, the rest of clipped layers by the others."""
    clipped: set[int] = set()
    while True:
        rest = goal - sum(MOST * sizes[i] for i in clipped)
        open_ = [i for i in range(len(sizes)) if i not in clipped]
        scale = rest / max(sum(shares[i] * sizes[i] for i in open_), 1e-9)
        over = {i for i in open_ if scale * shares[i] > MOST}
        if not over:
            return [
                MOST * n if i in clipped else scale * shares[i] * n for i, n in enumerate(sizes)
            ]
        clipped |= over


@settings(max_examples=100)
@given(
    st.lists(st.integers(20, 400), min_size=3, max_size=3),
    st.lists(st.floats(0.05, 1) | st.just(0.0), min_size=3, max_size=3),
    st.sets(st.integers(0, 2), max_size=2),
    st.floats(0, 1),
)
def test_the_target_is_met_in_proportion_to_the_shares(
    channels: list[int], shares: list[float], protected: set[int], part: float
) -> None:
    widths = widths_of(*channels)
    sizes = [0 if layer in protected else n for layer, n in enumerate(channels)]
    most = sum(MOST * n for n, share in zip(sizes, shares, strict=True) if share > 0)
    assume(most > 0)
    goal = part * most
    target = goal * CHANNEL / decoder(widths)
    found = uniform(LABELS, widths, target, ["channel"], protected=sorted(protected), shares=shares)
    removed = found.removed["channel"]
    assert abs(sum(removed) - goal) <= 0.5 + 1e-6
    assert found.sparsity == pytest.approx(sum(removed) * CHANNEL / decoder(widths))
    expected = filled(goal, shares, sizes)
    for number, wanted, size in zip(removed, expected, sizes, strict=True):
        assert abs(number - wanted) <= 1.6
        assert number <= MOST * size + 1


def test_a_layer_that_gives_most_gives_its_all_but_a_twelfth() -> None:
    widths = widths_of(100, 100, 100)
    target = 150 * CHANNEL / decoder(widths)
    removed = uniform(LABELS, widths, target, ["channel"], shares=[1, 10, 1]).removed["channel"]
    assert removed == [29, 92, 29]
    # if that is not enough, all give more
    target = 285 * CHANNEL / decoder(widths)
    removed = uniform(LABELS, widths, target, ["channel"], shares=[1, 10, 1]).removed["channel"]
    assert removed == [95, 95, 95]
    with pytest.raises(UserError, match="the most is"):
        uniform(LABELS, widths, 0.9, ["channel"], shares=[1, 10, 1])


@pytest.mark.parametrize(
    "axes", [("channel",), ("group",), ("group", "channel"), ("query", "channel")]
)
def test_equal_shares_are_as_good_as_none(axes: tuple[str, ...]) -> None:
    widths = widths_of(90, 90, 90, group=4)
    for target in (0.0, 0.1, 0.2, 0.3):
        plain = uniform(LABELS, widths, target, axes)
        for shares in ([1.0] * 3, [0.01] * 3, [1e6] * 3):
            assert uniform(LABELS, widths, target, axes, shares=shares) == plain


def test_heads_and_channels_follow_the_shares_together() -> None:
    widths = widths_of(300, 300, 300, group=10)
    plan = uniform(LABELS, widths, 0.3, ["group", "channel"], shares=[1, 3, 0.5])
    assert plan.sparsity == pytest.approx(0.3, abs=0.001)
    for axis, size in (("group", 10), ("channel", 300)):
        one, three, half = (number / size for number in plan.removed[axis])
        assert three == pytest.approx(3 * one, abs=0.15)
        assert half == pytest.approx(one / 2, abs=0.1)
        assert one == pytest.approx(0.2, abs=0.08)


def test_shares_that_differ_are_refused_under_stock() -> None:
    with pytest.raises(UserError, match="the same share of every layer under --stock") as caught:
        uniform(LABELS, widths_of(90, 90, 90), 0.1, ["channel"], stock=True, shares=[1, 1, 1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-new", "falcon-7b", "phi3", "qwen3"])
def test_a_units_cost_is_what_goes_with_it(name: str) -> None:
    dense = tiny_model(name)
    before = Structure.of(dense)
    labels = unique_labels(dense, before)
    axes = [axis for axis in cuttable(before) if axis not in ("hidden", "layer")]
    table = axes_of(labels, before.widths, axes[::-1], [2])
    assert [axis.name for axis in table] == [
        axis for axis in ("group", "query", "value", "channel") if axis in axes
    ]
    for axis in table:
        sizes = before.widths.layers[1]
        assert axis.units == [sizes[axis.name] - 1] * 2 + [0]
        model, structure = tiny_model(name), Structure.of(dense)
        keep = torch.arange(sizes[axis.name] - 1)
        if axis.name in ("query", "value"):
            keep = keep.expand(sizes["group"], -1)
        cut(model, structure, Layout.full(structure.widths).replace_layer(1, {axis.name: keep}))
        gone = count_actual(dense, before) - count_actual(model, structure)
        assert gone == axis.costs[1] == axis.weight([0, 1, 0])


def test_an_axis_counts_units_and_parameters() -> None:
    axis = Axis("channel", [9, 0, 4], [10, 10, 20])
    assert axis.weight([2, 0, 3]) == 80
    assert axis.sizes() == [100, 0, 100], "a layer without units to give has none to share out"
    assert axis.spread([0.5, 0.5, 0.5]) == [5, 0, 3], "seven and a half in all"
    assert axis.spread([1.0, 1.0, 1.0]) == [9, 0, 4]
    many: Any = Axis("channel", [9] * 8, [1] * 8)
    assert many.spread([0.25] * 8) == [2, 3, 3, 2, 2, 3, 3, 2]
    assert sum(many.spread([0.33] * 8)) == round(0.33 * 80)
