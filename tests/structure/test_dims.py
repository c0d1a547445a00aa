from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_prune.structure.dims import Dim, members, parse
from tests.structure.literal import (
    PLAIN,
    SIZES,
    WITHIN_GROUPS,
    Tree,
    axes_of,
    entries,
    keeps,
    stays,
    text_of,
    trees,
)

AXES = (*PLAIN, *WITHIN_GROUPS)


def dim_of(tree: Tree) -> Dim:
    line = parse(text_of(tree))
    assert line.reads is None
    return line.writes


@given(trees(), SIZES)
def test_size_and_coordinates_count_every_entry(tree: Tree, sizes: dict[str, int]) -> None:
    dim, literal = dim_of(tree), entries(tree, sizes)
    assert dim.size(sizes) == len(literal)
    assert set(dim.names()) == axes_of(tree)
    assert all((axis in dim) == (axis in axes_of(tree)) for axis in AXES)
    grid = dim.coordinates(sizes)
    assert set(grid) == axes_of(tree)
    for axis, index in grid.items():
        assert index.tolist() == [entry.get(axis, -1) for entry in literal]


@given(trees(), SIZES, st.data())
def test_mask_and_positions_keep_what_the_loop_keeps(
    tree: Tree, sizes: dict[str, int], data: st.DataObject
) -> None:
    keep = data.draw(keeps(sizes, AXES))
    expected = [stays(entry, keep) for entry in entries(tree, sizes)]
    dim = dim_of(tree)
    assert dim.mask(sizes, keep).tolist() == expected
    assert dim.positions(sizes, keep).tolist() == [i for i, kept in enumerate(expected) if kept]


@given(trees(), SIZES, st.data())
def test_what_is_left_has_the_size_at_the_kept_widths(
    tree: Tree, sizes: dict[str, int], data: st.DataObject
) -> None:
    keep = data.draw(keeps(sizes, AXES))
    left = sizes | {axis: kept.shape[-1] for axis, kept in keep.items()}
    dim = dim_of(tree)
    assert len(dim.positions(sizes, keep)) == dim.size(left)


@given(trees(), SIZES, st.data())
def test_reduce_sums_everything_but_the_axis(
    tree: Tree, sizes: dict[str, int], data: st.DataObject
) -> None:
    dim, literal = dim_of(tree), entries(tree, sizes)
    values = torch.arange(1.0, len(literal) + 1).double() ** 2
    for axis in axes_of(tree):
        totals: dict[tuple[int, ...], float] = {}
        for entry, value in zip(literal, values.tolist(), strict=True):
            if axis in entry:
                unit = (entry[axis],)
                if axis in WITHIN_GROUPS:
                    unit = (entry["group"], entry[axis])
                totals[unit] = totals.get(unit, 0.0) + value
        shape = ["group", axis] if axis in WITHIN_GROUPS else [axis]
        reduced = dim.reduce(values, axis, sizes)
        assert list(reduced.shape) == [sizes[name] for name in shape]
        for unit in itertools.product(*(range(sizes[name]) for name in shape)):
            assert reduced[unit].item() == totals.get(unit, 0.0)


def test_units_differ_from_group_to_group() -> None:
    sizes = {"group": 3, "query": 3, "head_dim": 2}
    dim = parse("hidden -> (group query head_dim) + (group head_dim)").writes
    keep = {"group": torch.tensor([0, 2]), "query": torch.tensor([[0, 2], [1, 2]])}
    assert dim.positions(sizes, keep).tolist() == [0, 1, 4, 5, 14, 15, 16, 17, 18, 19, 22, 23]
    assert members("query", sizes, keep).tolist() == [
        [True, False, True],
        [False, False, False],
        [False, True, True],
    ]
    del keep["group"]
    keep["query"] = torch.tensor([[0], [1], [2]])
    assert dim.positions(sizes, keep).tolist() == [0, 1, 8, 9, 16, 17, 18, 19, 20, 21, 22, 23]


def test_a_sum_inside_a_product_lies_within_each_group() -> None:
    dim = parse("(group (query + 1 + 1) head_dim)").writes
    sizes = {"group": 2, "query": 2, "head_dim": 1}
    assert dim.coordinates(sizes)["query"].tolist() == [0, 1, -1, -1, 0, 1, -1, -1]
    assert dim.positions(sizes, {"query": torch.tensor([[1], [0]])}).tolist() == [1, 2, 3, 4, 6, 7]


def test_indices_stay_on_the_cpu_whatever_the_default_device_is() -> None:
    dim = parse("(group (query + 1 + 1) head_dim) + (channel)").writes
    sizes = {"group": 2, "query": 3, "head_dim": 2, "channel": 4}
    keep = {"query": torch.tensor([[1], [0]]), "channel": torch.tensor([0, 3])}
    values = torch.arange(24.0)
    expected = [dim.positions(sizes, kept) for kept in (keep, {**keep, "group": torch.arange(2)})]
    sums = dim.reduce(values, "query", sizes)
    with torch.device("meta"):
        assert torch.equal(dim.positions(sizes, keep), expected[0])
        assert torch.equal(
            dim.positions(sizes, {**keep, "group": torch.arange(2, device="cpu")}), expected[1]
        )
        assert torch.equal(dim.reduce(values, "query", sizes), sums)


def test_expected_sizes_can_be_differentiated() -> None:
    sizes = {
        "group": torch.tensor(2.0, requires_grad=True),
        "query": torch.tensor(3.0, requires_grad=True),
        "head_dim": 8,
    }
    total = parse("(group (query + 1 + 1) head_dim)").writes.size(sizes)
    total.backward()
    assert total.item() == 2 * (3 + 2) * 8
    assert (sizes["group"].grad.item(), sizes["query"].grad.item()) == ((3 + 2) * 8, 2 * 8)


def test_a_line_reads_and_writes_and_a_norm_writes_only() -> None:
    line = parse("  hidden->( group 3 head_dim )")
    assert line.reads == parse("hidden").writes
    assert line.writes == parse("(group 3 head_dim)").writes
    assert parse("hidden").reads is None


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "the end"),
        ("hidden ->", "the end"),
        ("-> hidden", "->"),
        ("hidden -> -> channel", "->"),
        ("hidden -> channel -> vocab", "->"),
        ("(group head_dim", "the end"),
        ("(group -> head_dim)", "->"),
        ("group) head_dim", "->"),
        ("()", ")"),
        ("channel +", "the end"),
        ("+ channel", "+"),
        ("channel + + channel", "+"),
        ("hidden -> chan*nel", "*nel"),
        ("hidden -> Channel", "Channel"),
        ("hidden - channel", "- channel"),
    ],
)
def test_what_is_not_of_the_language_is_refused_with_the_place(text: str, place: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse(text)
    assert place in str(caught.value)
