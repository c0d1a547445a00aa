from __future__ import annotations

import json
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.structure import LayerUnits, Layout, Widths
from lit_prune.structure.dims import parse
from lit_prune.structure.layout import ranges, unranges
from tests.structure.literal import keeps

LAYER_AXES = ("channel", "group", "query", "value")
#: Every kind of dimension that a layer's tensors have.
DIMS = [
    parse(text).writes
    for text in (
        "channel + channel",
        "(group query head_dim) + (group head_dim) + (group value)",
        "(group (query + 1 + 1) head_dim)",
        "(group query value)",
        "hidden",
    )
]
LAYER_SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in LAYER_AXES})


@st.composite
def widths(draw: st.DrawFn) -> Widths:
    shared = {"hidden": draw(st.integers(1, 5)), "head_dim": 2, "vocab": 7}
    return Widths(shared, draw(st.lists(LAYER_SIZES, min_size=1, max_size=4)))


@st.composite
def layouts(draw: st.DrawFn, of: Widths | None = None) -> Layout:
    of = draw(widths()) if of is None else of
    count = len(of.layers)
    kept = sorted(draw(st.sets(st.sampled_from(range(count)), min_size=1)))
    layers = tuple(LayerUnits(i, draw(keeps(of.layers[i], LAYER_AXES))) for i in kept)
    return Layout(of, draw(keeps(of.shared, ("hidden",))).get("hidden"), layers)


def plain(layout: Layout) -> Any:
    hidden = None if layout.hidden is None else layout.hidden.tolist()
    layers = [(u.source, {a: k.tolist() for a, k in u.keep.items()}) for u in layout.layers]
    return layout.of, hidden, layers


def kept_of(layout: Layout, place: int) -> dict[str, Tensor]:
    hidden = {} if layout.hidden is None else {"hidden": layout.hidden}
    return {**layout.layers[place].keep, **hidden}


@given(st.sets(st.integers(0, 40)))
def test_ranges_and_back(indices: set[int]) -> None:
    ascending = sorted(indices)
    assert list(unranges(ranges(ascending))) == ascending


def test_ranges_are_short() -> None:
    assert ranges([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"
    assert ranges([]) == ""


@given(layouts())
def test_plain_types_and_back_through_json(layout: Layout) -> None:
    data = json.loads(json.dumps(layout.to_dict()))
    read = Layout.from_dict(data)
    assert plain(read) == plain(layout)
    assert all(k.dtype == torch.int64 for u in read.layers for k in u.keep.values())
    found = Widths(data["widths"]["shared"], data["widths"]["layers"])
    assert found == read.widths() == layout.widths()


@given(layouts())
def test_widths_are_the_numbers_of_kept_units(layout: Layout) -> None:
    left = layout.widths()
    assert len(left.layers) == len(layout.layers)
    assert left.shared["hidden"] == len(
        range(layout.of.shared["hidden"]) if layout.hidden is None else layout.hidden
    )
    for place, unit in enumerate(layout.layers):
        sizes = layout.of.sizes(unit.source)
        for dim in DIMS:
            kept = dim.positions(sizes, kept_of(layout, place))
            assert dim.size(left.sizes(place)) == len(kept)


@given(layouts(), st.data())
def test_two_cuts_one_after_the_other_are_the_joint_cut(first: Layout, data: st.DataObject) -> None:
    second = data.draw(layouts(first.widths()))
    joint = first.then(second)
    assert joint.of == first.of
    assert joint.widths() == second.widths()
    for place, unit in enumerate(second.layers):
        source = first.layers[unit.source].source
        assert joint.layers[place].source == source
        for dim in DIMS:
            one = dim.positions(first.of.sizes(source), kept_of(first, unit.source))
            two = dim.positions(second.of.sizes(unit.source), kept_of(second, place))
            both = dim.positions(first.of.sizes(source), kept_of(joint, place))
            assert both.tolist() == one[two].tolist()


@given(layouts())
def test_cutting_nothing_changes_nothing(layout: Layout) -> None:
    before = Layout.full(layout.of).then(layout)
    after = layout.then(Layout.full(layout.widths()))
    assert plain(before) == plain(after) == plain(layout)


def test_indices_stay_on_the_cpu_whatever_the_default_device_is() -> None:
    of = Widths({"hidden": 4}, [{"channel": 3, "group": 2, "query": 3}])
    layout = Layout.full(of).replace_layer(0, {"query": torch.tensor([[0, 2], [1, 2]])})
    with torch.device("meta"):
        read = Layout.from_dict(layout.to_dict())
        grouped = Layout.full(of).replace_layer(0, {"group": torch.tensor([1], device="cpu")})
        left = {"query": torch.tensor([[1]], device="cpu")}
        joint = grouped.then(Layout.full(grouped.widths()).replace_layer(0, left))
    assert plain(read) == plain(layout)
    assert joint.layers[0].keep["query"].tolist() == [[1]]


def test_replacing_a_layer_leaves_the_others() -> None:
    of = Widths({"hidden": 4}, [{"channel": 3}, {"channel": 3}])
    layout = Layout.full(of).replace_layer(1, {"channel": torch.tensor([0, 2])})
    assert [list(unit.keep) for unit in layout.layers] == [[], ["channel"]]
    assert [sizes["channel"] for sizes in layout.widths().layers] == [3, 2]


def test_a_copy_of_widths_is_its_own() -> None:
    of = Widths({"hidden": 4}, [{"channel": 3}, {"channel": 5}])
    copy = of.copy()
    copy.shared["hidden"], copy.layers[0]["channel"] = 1, 5
    assert (of.shared["hidden"], of.layers[0]["channel"]) == (4, 3)
    assert (of.uniform("channel"), copy.uniform("channel")) == (None, 5)
    assert of.sizes() == {"hidden": 4}
    assert of.sizes(1) == {"hidden": 4, "channel": 5}
