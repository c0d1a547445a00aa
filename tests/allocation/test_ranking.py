"""Ranking over the whole model against a literal greedy loop, and widths of a multiple."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_prune.allocation.plan import TOLERANCE, Plan
from lit_prune.allocation.ranking import Scores, aligned, kept_units, ranked
from lit_prune.errors import UserError
from lit_prune.structure import Structure, Widths
from lit_prune.structure.counting import count, unique_labels
from lit_prune.structure.dims import PER_GROUP
from tests.structure.tiny import tiny_config

_STRUCTURE, _MODEL = Structure.of_config(tiny_config("llama"))
LABELS = unique_labels(_MODEL, _STRUCTURE)
AXES = [("channel",), ("group",), ("query",), ("value",)]
AXES += [("group", "channel"), ("query", "channel")]


def widths_of(layers: list[dict[str, int]]) -> Widths:
    return Widths(_STRUCTURE.widths.shared, [{"value": 8, **sizes} for sizes in layers])


def same(channel: int = 20, group: int = 2, query: int = 3) -> Widths:
    return widths_of([{"channel": channel, "group": group, "query": query}] * 3)


def decoder(widths: Widths) -> int:
    return count(LABELS, widths, decoder=True)


def without(widths: Widths, removed: dict[str, list[int]]) -> Widths:
    left = widths.copy()
    for axis, numbers in removed.items():
        for sizes, number in zip(left.layers, numbers, strict=True):
            sizes[axis] -= number
    return left


def scores_of(widths: Widths, axes: tuple[str, ...], seed: int) -> Scores:
    """Scores that differ in size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    found: Scores = {}
    for axis in axes:
        found[axis] = []
        for sizes in widths.layers:
            shape = (sizes["group"], sizes[axis]) if axis in PER_GROUP else (sizes[axis],)
            scale = 10 ** (2 * torch.rand(1, generator=generator) - 1)
            found[axis].append(scale * torch.rand(shape, generator=generator))
    return found


def greedy(
    scores: Scores, widths: Widths, target: float, protected: tuple[int, ...]
) -> tuple[dict[str, list[int]], float]:
    """Take the lowest unit of all, one after the other, where that comes closer to the target."""
    total, rows, costs = decoder(widths), {}, {}
    for axis, tensors in scores.items():
        for layer, values in enumerate(tensors):
            own = [sorted(row) for row in values.reshape(-1, values.shape[-1]).tolist()]
            if layer not in protected:
                rows[axis, layer] = own
            less = widths.copy()
            less.layers[layer][axis] -= 1
            costs[axis, layer] = total - decoder(less)
    removed, gone = {axis: [0] * 3 for axis in scores}, 0
    while rows := {place: own for place, own in rows.items() if len(own[0]) > 1}:
        values = {place: sum(row[0] for row in own) / len(own) for place, own in rows.items()}
        axis, layer = place = min(values, key=values.__getitem__)
        over = gone + costs[place] - target * total
        if over >= min(abs(gone - target * total), TOLERANCE * total):
            del rows[place]
            continue
        for row in rows[place]:
            row.pop(0)
        removed[axis][layer] += 1
        gone += costs[place]
    return removed, gone / total


SIZES = st.fixed_dictionaries(
    {"channel": st.integers(1, 15), "group": st.integers(1, 5), "query": st.integers(1, 4)}
)


@settings(max_examples=100)
@given(
    st.lists(SIZES, min_size=3, max_size=3),
    st.sampled_from(AXES),
    st.sets(st.integers(0, 2), max_size=2).map(tuple),
    st.floats(0, 1.2),
    st.integers(0, 1000),
)
def test_the_lowest_of_all_go_first(
    layers: Any,
    axes: tuple[str, ...],
    protected: tuple[int, ...],
    share: float,
    seed: int,
) -> None:
    widths = widths_of(layers)
    assume(all(any(sizes[axis] > 1 for sizes in widths.layers) for axis in axes))
    scores = scores_of(widths, axes, seed)
    target = min(share * greedy(scores, widths, 1.0, protected)[1], 0.99)
    expected, reached = greedy(scores, widths, target, protected)
    try:
        plan = ranked(scores, LABELS, widths, target, axes, protected=protected)
    except UserError:
        assert abs(reached - target) > TOLERANCE
        return
    assert abs(reached - target) <= TOLERANCE
    assert plan.removed == expected
    left = without(widths, plan.removed)
    assert plan.sparsity == pytest.approx(1 - decoder(left) / decoder(widths))
    for layer, sizes in enumerate(left.layers):
        assert min(sizes.values()) >= 1
        assert layer not in protected or sizes == widths.layers[layer]


def test_all_but_one_of_each_can_go() -> None:
    widths = same()
    bare = widths_of([{"channel": 1, "group": 1, "query": 3}] * 3)
    most = 1 - decoder(bare) / decoder(widths)
    axes = ("group", "channel")
    plan = ranked(scores_of(widths, axes, 0), LABELS, widths, most, axes)
    assert plan.removed == {"group": [1] * 3, "channel": [19] * 3}
    assert plan.sparsity == pytest.approx(most)


def test_every_group_gives_as_many_query_heads_by_the_mean_of_the_lowest() -> None:
    widths = same()
    row = torch.tensor([[0.1, 5.0, 3.0], [9.0, 1.1, 8.0]])  # means of the lowest: 0.6, 5.5
    scores = {"query": [row, row + 0.2, row - 0.05]}
    cost = 36 * 16 + 8  # q rows with their bias and o columns of a head
    for number, expected in enumerate([[0, 0, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [1, 1, 2]]):
        target = number * 2 * cost / decoder(widths)
        assert ranked(scores, LABELS, widths, target, ["query"]).removed == {"query": expected}
    layout = kept_units(Plan({"query": [1, 1, 2]}, 0.0), scores, widths)
    kept = [unit.keep["query"].tolist() for unit in layout.layers]
    assert kept == [[[1, 2], [0, 2]], [[1, 2], [0, 2]], [[1], [0]]]


@pytest.mark.parametrize("heads", ["group", "query"])
def test_what_parameters_are_worth_the_same_goes_evenly(heads: str) -> None:
    """Where each parameter scores about 1, in whatever unit it is, all axes lose the same share."""
    widths = widths_of([{"channel": 40, "group": 6, "query": 4}] * 3)
    total, draw = decoder(widths), torch.Generator().manual_seed(0)
    scores: Scores = {}
    for axis in (heads, "channel"):
        less = widths.copy()
        less.layers[0][axis] -= 1
        groups = 6 if axis == "query" else 1
        entries, size = (total - decoder(less)) / groups, widths.layers[0][axis]
        shape = [groups, size] if groups > 1 else [size]
        noise = [torch.rand(shape, generator=draw) for _ in widths.layers]
        scores[axis] = [entries * (1 + 0.5 * x) for x in noise]
    found = {}
    for per_parameter in (False, True):
        plan = ranked(scores, LABELS, widths, 0.4, (heads, "channel"), per_parameter=per_parameter)
        found[per_parameter] = {
            axis: sum(gone) / (3 * widths.layers[0][axis]) for axis, gone in plan.removed.items()
        }
    assert found[True][heads] == pytest.approx(found[True]["channel"], abs=0.2)
    assert abs(found[False][heads] - found[False]["channel"]) > 0.3


def test_what_is_too_large_is_passed_by_for_smaller_units_behind_it() -> None:
    scores = {"group": [torch.tensor([0.1, 9.0])] * 3, "channel": [torch.arange(20.0)] * 3}
    target = 4 * 110 / decoder(same())  # a channel has 110 parameters, a group 2304 and more
    plan = ranked(scores, LABELS, same(), target, ["group", "channel"])
    assert plan.removed == {"group": [0, 0, 0], "channel": [2, 1, 1]}
    assert plan.sparsity == pytest.approx(target)


def test_a_layer_that_loses_nothing_keeps_all() -> None:
    widths = same()
    scores = scores_of(widths, ("group", "channel"), 1)
    plan = Plan({"group": [1, 0, 0], "channel": [3, 0, 4]}, 0.1)
    layout = kept_units(plan, scores, widths)
    assert [sorted(unit.keep) for unit in layout.layers] == [["channel", "group"], [], ["channel"]]
    for layer, number in ((0, 3), (2, 4)):
        values = scores["channel"][layer].tolist()
        expected = sorted(sorted(range(20), key=values.__getitem__)[number:])
        assert layout.layers[layer].keep["channel"].tolist() == expected
    assert layout.of == widths


def test_scores_may_be_of_any_dtype_and_the_default_too() -> None:
    widths = same(200)
    scores = scores_of(widths, ("channel",), 2)
    expected = ranked(scores, LABELS, widths, 0.3, ["channel"])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert ranked(scores, LABELS, widths, 0.3, ["channel"]) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    double = {"channel": [values.double() for values in scores["channel"]]}
    assert ranked(double, LABELS, widths, 0.3, ["channel"]) == expected


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_refused(value: str) -> None:
    widths = same()
    for axis in ("channel", "query"):
        scores = scores_of(widths, ("channel", "query"), 0)
        scores[axis][1].view(-1)[2] = float(value)
        text = f"expected finite scores, got NaN or infinity among those of {axis} in layer 1;"
        with pytest.raises(UserError, match=text) as caught:
            ranked(scores, LABELS, widths, 0.1, ["channel", "query"])
        assert "\n" not in str(caught.value)
        plan = Plan({"channel": [1, 1, 1], "query": [1, 1, 1]}, 0.1)
        with pytest.raises(UserError, match=text):
            kept_units(plan, scores, widths)


@pytest.mark.parametrize(
    ("sparsity", "axes", "options", "text"),
    [
        (0.99, ["channel"], {}, "got 0.99; the nearest is 0.297 of"),
        (0.05, ["group"], {}, "cutting group can reach, got 0.05; the nearest is"),
        (0.2, ["channel"], {"protected": [0, 1, 2]}, "the nearest is 0.000"),
        (1.0, ["channel"], {}, "from 0 to below 1, got 1"),
        (0.2, ["chanel"], {}, "got 'chanel'"),
        (0.1, ["query", "group"], {}, "one of group, query, value, got group and query"),
        (0.2, ["channel"], {"protected": [3]}, "from 0 to 2, got 3"),
    ],
)
def test_what_cannot_be_is_refused(
    sparsity: float, axes: list[str], options: dict[str, Any], text: str
) -> None:
    scores = scores_of(same(), ("channel", "group", "query"), 0)
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        ranked(scores, LABELS, same(), sparsity, axes, **options)
    assert "\n" not in str(caught.value)


def plan_of(*removed: int) -> Plan:
    return Plan({"channel": list(removed)}, 0.0)


def kept(plan: Plan, widths: Widths) -> list[int]:
    return [sizes["channel"] for sizes in without(widths, plan.removed).layers]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), min_size=3, max_size=3),
    st.integers(2, 16),
    st.booleans(),
)
def test_kept_channels_are_a_multiple(layers: Any, multiple: int, same: bool) -> None:
    widths = widths_of([{"channel": n, "group": 2, "query": 3} for n, _ in layers])
    plan = plan_of(*(min(int(share * n), n - 1) for n, share in layers))
    found = aligned(plan, LABELS, widths, multiple, same=same)
    carry = 0
    for width, before, after, sizes in zip(
        kept(found, widths),
        kept(plan, widths),
        found.removed["channel"],
        widths.layers,
        strict=True,
    ):
        assert width % multiple == 0 or width == sizes["channel"]
        assert after >= 0
        if before == sizes["channel"]:
            assert after == 0
            continue
        assert width >= min(multiple, sizes["channel"])
        wanted = before + (0 if same else carry)
        if multiple <= wanted <= sizes["channel"] - multiple:
            assert abs(width - wanted) <= multiple / 2
        carry = wanted - width
    total = decoder(widths)
    assert found.sparsity == pytest.approx(1 - decoder(without(widths, found.removed)) / total)


def test_what_is_over_goes_to_the_next_layer_that_is_cut() -> None:
    labels = [
        type(label)(label.name, label.dims, number)
        for number in range(6)
        for label in LABELS
        if label.layer == 0
    ]
    layer = {"channel": 40, "group": 2, "query": 3, "value": 8}
    widths = Widths(_STRUCTURE.widths.shared, [dict(layer) for _ in range(6)])
    plan = plan_of(*[10] * 6)
    found = aligned(plan, labels, widths, 8)
    # 30 are wanted: 32, then 28 and 32 of which 4 too many, then 26 and 24, …
    assert kept(found, widths) == [32, 32, 24, 32, 32, 32]
    assert kept(aligned(plan, labels, widths, 8, same=True), widths) == [32] * 6
    protected = plan_of(10, 0, 10, 0, 0, 10)
    assert kept(aligned(protected, labels, widths, 8), widths) == [32, 40, 32, 40, 40, 24]


def test_one_multiple_stays_or_all_there_are() -> None:
    widths = widths_of([{"channel": n, "group": 2, "query": 3} for n in (90, 20, 5)])
    found = aligned(plan_of(89, 19, 4), LABELS, widths, 16, same=True)
    assert kept(found, widths) == [16, 16, 5]
    found = aligned(plan_of(0, 5, 0), LABELS, widths, 8)
    assert kept(found, widths) == [90, 16, 5], "a layer that loses nothing keeps its width"


def test_heads_are_not_rounded_nor_anything_without_a_multiple() -> None:
    widths, heads = same(), Plan({"group": [1, 0, 1]}, 0.2)
    assert aligned(heads, LABELS, widths, 8) is heads
    both = Plan({"group": [1, 0, 1], "channel": [5, 5, 5]}, 0.2)
    assert aligned(both, LABELS, widths, 0) is aligned(both, LABELS, widths, 1) is both
    found = aligned(both, LABELS, widths, 8)
    assert found.removed["group"] == [1, 0, 1]
    assert found.sparsity == pytest.approx(
        1 - decoder(without(widths, found.removed)) / decoder(widths)
    )
