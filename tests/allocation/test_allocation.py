from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lit_prune.allocation.plan import TOLERANCE, Plan, keep_highest, uniform
from lit_prune.errors import UserError
from lit_prune.structure import Structure, Widths
from lit_prune.structure.counting import count, unique_labels
from tests.structure.tiny import tiny_config

_STRUCTURE, _MODEL = Structure.of_config(tiny_config("llama"))
LABELS = unique_labels(_MODEL, _STRUCTURE)
AXES = [("channel",), ("group",), ("query",), ("group", "channel"), ("query", "channel")]


def widths_of(layers: list[dict[str, int]]) -> Widths:
    return Widths(_STRUCTURE.widths.shared, [{"value": 8, **sizes} for sizes in layers])


def same(channel: int = 20, group: int = 2, query: int = 3) -> Widths:
    return widths_of([{"channel": channel, "group": group, "query": query}] * 3)


def after(widths: Widths, plan: Plan) -> Widths:
    left = widths.copy()
    for axis, removed in plan.removed.items():
        for sizes, number in zip(left.layers, removed, strict=True):
            sizes[axis] -= number
    return left


def decoder(widths: Widths) -> int:
    return count(LABELS, widths, decoder=True)


def unit_costs(widths: Widths, axes: tuple[str, ...], protected: tuple[int, ...]) -> list[int]:
    """Parameters that go with one unit of each axis and layer that has one to give."""
    costs = []
    for axis, layer in itertools.product(axes, range(3)):
        if layer not in protected and widths.layers[layer][axis] > 1:
            less = widths.copy()
            less.layers[layer][axis] -= 1
            costs.append(decoder(widths) - decoder(less))
    return costs


SIZES = st.fixed_dictionaries(
    {"channel": st.integers(1, 90), "group": st.integers(1, 5), "query": st.integers(1, 4)}
)


@given(
    st.lists(SIZES, min_size=3, max_size=3),
    st.sampled_from(AXES),
    st.sets(st.integers(0, 2), max_size=2).map(tuple),
    st.floats(0, 1) | st.floats(0.9, 1) | st.floats(1, 1.1),
)
def test_the_target_is_met_within_one_unit(
    layers: Any, axes: tuple[str, ...], protected: tuple[int, ...], share: float
) -> None:
    widths = widths_of(layers)
    assume(all(any(sizes[axis] > 1 for sizes in layers) for axis in axes))
    total, costs = decoder(widths), unit_costs(widths, axes, protected)
    bare = widths.copy()
    for axis, layer in itertools.product(axes, set(range(3)) - set(protected)):
        bare.layers[layer][axis] = 1
    most = total - decoder(bare)
    target = share * most / total
    try:
        plan = uniform(LABELS, widths, target, axes, protected=protected)
    except UserError:
        assert target * total > most or max(costs, default=0) > TOLERANCE * total
        return
    left = after(widths, plan)
    assert plan.removed.keys() == set(axes)
    assert plan.sparsity == pytest.approx(1 - decoder(left) / total)
    for layer, sizes in enumerate(left.layers):
        assert min(sizes.values()) >= 1
        assert layer not in protected or sizes == widths.layers[layer]
    if target * total <= most:
        assert abs(plan.sparsity - target) * total <= max(costs, default=0) + 1e-6
        if axes == ("channel",):  # half a unit, since all channels cost the same
            assert abs(plan.sparsity - target) * total <= max(costs, default=0) / 2 + 1e-6
    else:
        assert plan.sparsity == pytest.approx(most / total)
        assert target - plan.sparsity <= TOLERANCE


@given(st.integers(2, 300), st.integers(1, 12), st.floats(0, 0.9))
def test_layers_of_one_width_lose_the_same_number_or_one_more(
    channels: int, layers: int, target: float
) -> None:
    labels = [label for label in LABELS if label.layer == 0]
    widths = Widths(
        _STRUCTURE.widths.shared,
        [{"channel": channels, "group": 2, "query": 3, "value": 8}] * layers,
    ).copy()
    every = [
        type(label)(label.name, label.dims, layer) for layer in range(layers) for label in labels
    ]
    try:
        removed = uniform(every, widths, target, ["channel"]).removed["channel"]
    except UserError:
        assume(False)
        return
    assert max(removed) - min(removed) <= 1


def test_remainders_lie_evenly_over_the_layers() -> None:
    layer = {"channel": 30, "group": 2, "query": 3, "value": 8}
    labels = [
        type(label)(label.name, label.dims, number)
        for number in range(12)
        for label in LABELS
        if label.layer == 0
    ]
    widths = Widths(_STRUCTURE.widths.shared, [dict(layer) for _ in range(12)])
    cost = 3 * 36 + 2  # gate, up, down and their biases
    target = (12 * 5 + 4) * cost / count(labels, widths, decoder=True)
    removed = uniform(labels, widths, target, ["channel"]).removed["channel"]
    assert sum(removed) == 64
    extra = [layer for layer, number in enumerate(removed) if number == 6]
    assert len(extra) == 4
    assert all(b - a == 3 for a, b in itertools.pairwise(extra))


def test_layers_of_other_widths_lose_the_same_share() -> None:
    widths = same(200)
    widths.layers[1]["channel"] = 100
    removed = uniform(LABELS, widths, 0.3, ["channel"]).removed["channel"]
    assert removed[0] == pytest.approx(2 * removed[1], abs=2)
    assert removed[0] == pytest.approx(removed[2], abs=1)


def test_channels_make_up_for_what_heads_are_too_coarse_for() -> None:
    widths = same(90, group=4)
    plan = uniform(LABELS, widths, 0.3, ["channel", "group"])
    assert min(plan.removed["group"]) >= 1
    assert abs(plan.sparsity - 0.3) * decoder(widths) <= 110 / 2
    heads = sum(plan.removed["group"]) / 12
    channels = sum(plan.removed["channel"]) / 270
    assert heads == pytest.approx(channels, abs=0.1)


@pytest.mark.parametrize(
    ("target", "sizes", "axis", "stock"),
    [
        (0.057, (21, 3, 4), "group", False),  # rounding groups up takes more than the target
        (0.748, (4, 5, 2), "group", False),  # rounding them down leaves more than all channels
        (0.509, (11, 2, 4), "query", True),
        (0.5, (6, 1, 4), "query", True),
    ],
)
def test_heads_are_rounded_so_that_channels_can_make_up(
    target: float, sizes: tuple[int, int, int], axis: str, stock: bool
) -> None:
    plan = uniform(LABELS, same(*sizes), target, [axis, "channel"], stock=stock)
    assert plan.sparsity == pytest.approx(target, abs=0.008)


def test_protected_layers_raise_the_share_of_the_others() -> None:
    widths = same(100)
    free = uniform(LABELS, widths, 0.2, ["channel"])
    bound = uniform(LABELS, widths, 0.2, ["channel"], protected=[0, 2])
    assert bound.removed["channel"][0] == bound.removed["channel"][2] == 0
    assert bound.removed["channel"][1] == pytest.approx(sum(free.removed["channel"]), abs=1)


@given(st.integers(2, 90), st.integers(1, 5), st.sampled_from(AXES), st.floats(0, 0.9))
def test_stock_takes_the_same_number_everywhere(
    channels: int, groups: int, axes: tuple[str, ...], target: float
) -> None:
    assume(groups > 1 or "group" not in axes)
    widths, bare = same(channels, groups), same(channels, groups)
    total, costs = decoder(widths), unit_costs(widths, axes, ())
    for axis, sizes in itertools.product(axes, bare.layers):
        sizes[axis] = 1
    try:
        plan = uniform(LABELS, widths, target, axes, stock=True)
    except UserError:
        assert target * total > total - decoder(bare) or 3 * max(costs) > TOLERANCE * total
        return
    assert all(len(set(removed)) == 1 for removed in plan.removed.values())
    assert plan.sparsity == pytest.approx(1 - decoder(after(widths, plan)) / total)
    if axes == ("channel",):  # the nearest there is
        steps = [n * 3 * 110 / total for n in range(channels)]
        assert abs(plan.sparsity - target) <= min(abs(step - target) for step in steps) + 1e-9


def test_nothing_goes_at_zero() -> None:
    plan = uniform(LABELS, same(), 0.0, ["group", "channel"])
    assert plan == Plan({"group": [0, 0, 0], "channel": [0, 0, 0]}, 0.0)


@pytest.mark.parametrize(
    ("sparsity", "axes", "options", "text"),
    [
        (0.99, ["channel"], {}, "the nearest is 0.297 and the most is 0.297"),
        (0.5, ["query"], {"protected": [0, 1]}, "cut more axes"),
        (0.05, ["group"], {"stock": True}, "the nearest is 0.000"),
        (1.0, ["channel"], {}, "from 0 to below 1, got 1"),
        (-0.1, ["channel"], {}, "from 0 to below 1, got -0.1"),
        (float("nan"), ["channel"], {}, "from 0 to below 1, got nan"),
        (0.2, [], {}, "at least one axis"),
        (0.2, ["chanel"], {}, "got 'chanel'"),
        (0.2, ["hidden"], {}, "got 'hidden'"),
        (0.1, ["query", "group"], {}, "one of group, query, value, got group and query"),
        (0.2, ["channel"], {"protected": [3]}, "from 0 to 2, got 3"),
        (0.2, ["channel"], {"protected": [-1]}, "from 0 to 2, got -1"),
        (0.2, ["channel"], {"protected": [0, 1, 2]}, "the most is 0.000"),
        (0.2, ["channel"], {"protected": [0], "stock": True}, "no protected layers under --stock"),
    ],
)
def test_what_cannot_be_is_refused(
    sparsity: float, axes: list[str], options: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        uniform(LABELS, same(), sparsity, axes, **options)
    assert "\n" not in str(caught.value)


def test_an_axis_of_single_units_is_refused() -> None:
    widths = same(group=1)
    with pytest.raises(UserError, match="units to spare, got 'group'"):
        uniform(LABELS, widths, 0.1, ["group", "channel"])
    widths.layers[2]["group"] = 2
    assert uniform(LABELS, widths, 0.2, ["group", "channel"]).removed["group"][:2] == [0, 0]


def test_stock_needs_layers_of_one_width() -> None:
    widths = same()
    widths.layers[1]["channel"] = 19
    with pytest.raises(UserError, match="the same number of channel units in every layer"):
        uniform(LABELS, widths, 0.1, ["channel"], stock=True)
    assert uniform(LABELS, widths, 0.1, ["channel"])


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1), st.data())
def test_the_highest_stay(rows: list[list[int]], data: st.DataObject) -> None:
    removed = data.draw(st.integers(0, 3))
    literal = []
    for row in rows:
        left = list(range(4))
        for _ in range(removed):
            left.remove(min(left, key=lambda unit: (row[unit], unit)))  # of equals the first goes
        literal.append(left)
    scores = torch.tensor(rows, dtype=torch.float32)
    assert keep_highest(scores, removed).tolist() == literal
    assert keep_highest(scores[0], removed).tolist() == literal[0]
