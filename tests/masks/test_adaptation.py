from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.masks.adaptation import GATED, DecoderCount, Units, decide
from lit_prune.structure import Layout, Structure, Widths
from lit_prune.structure.counting import count, unique_labels
from tests.structure.tiny import FAMILIES, tiny_config

_STRUCTURE, _MODEL = Structure.of_config(tiny_config("llama"))
LABELS, WIDTHS = unique_labels(_MODEL, _STRUCTURE), _STRUCTURE.widths
COUNTED = DecoderCount(LABELS, WIDTHS)
TOTAL = count(LABELS, WIDTHS, decoder=True)


def drawn(seed: int, axes: tuple[str, ...] = GATED, widths: Widths = WIDTHS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {}
    for axis in axes:
        sizes = [widths.shared] if axis == "hidden" else widths.layers
        result[axis] = [3 * torch.randn(size[axis], generator=generator) for size in sizes]
    return result


def kept(layout: Layout, axis: str, layer: int = 0) -> list[int]:
    if axis == "hidden":
        found, number = layout.hidden, layout.of.shared["hidden"]
    else:
        found, number = layout.layers[layer].keep.get(axis), layout.of.layers[layer][axis]
    return list(range(number)) if found is None else found.tolist()


def numbers(layout: Layout, axis: str) -> list[int]:
    return [len(kept(layout, axis, i)) for i in range(1 if axis == "hidden" else 3)]


def decoder(layout: Layout) -> int:
    return count(LABELS, layout.widths(), decoder=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_polynomial_is_the_count(name: str) -> None:
    structure, model = Structure.of_config(tiny_config(name))
    labels, widths = unique_labels(model, structure), structure.widths
    counted = DecoderCount(labels, widths)
    assert counted.total == count(labels, widths, decoder=True)
    generator = torch.Generator().manual_seed(0)

    def below(size: int) -> float:
        return float(torch.randint(1, size + 1, (1,), generator=generator))

    kept = {a: torch.tensor([below(s[a]) for s in widths.layers]) for a in ("group", "channel")}
    kept["hidden"] = torch.tensor(below(widths.shared["hidden"]))
    for value in kept.values():
        value.requires_grad_()
    other = Widths(
        {**widths.shared, "hidden": kept["hidden"]},
        [
            {**s, **{a: kept[a][i] for a in ("group", "channel")}}
            for i, s in enumerate(widths.layers)
        ],
    )
    expected = count(labels, other, decoder=True)
    assert counted(kept).item() == expected.item()
    assert counted.sparsity(kept).item() == pytest.approx(1 - expected.item() / counted.total)
    places = list(kept.values())
    slopes = [torch.autograd.grad(value, places) for value in (counted(kept), expected)]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def literal(ratios: Units, target: float) -> tuple[list[float], list[float]]:
    """Every threshold and the share that goes below it, in a loop over units."""
    best = {axis: [values.max().item() for values in ratios[axis]] for axis in ratios}
    levels = sorted({v for values in ratios.values() for t in values for v in t.tolist()})
    shares = []
    for level in (-math.inf, *levels):
        widths = WIDTHS.copy()
        for axis, values in ratios.items():
            for layer, units in enumerate(values):
                stay = sum(v > level or v == best[axis][layer] for v in units.tolist())
                (widths.shared if axis == "hidden" else widths.layers[layer])[axis] = stay
        shares.append(1 - count(LABELS, widths, decoder=True) / TOTAL)
    return [-math.inf, *levels], shares


AXES = [axes for n in (1, 2, 3) for axes in itertools.combinations(GATED, n) if axes != ("group",)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0, 0.6), st.sampled_from(AXES))
def test_one_threshold_comes_nearest_to_the_target(
    seed: int, target: float, axes: tuple[str, ...]
) -> None:
    ratios = drawn(seed, axes)
    levels, shares = literal(ratios, target)
    try:
        decision = decide(ratios, COUNTED, target, multiple=0)
    except UserError:
        assert max(shares) < target - 0.02
        return
    share = 1 - decoder(decision.layout) / TOTAL
    assert decision.sparsity == decision.before == pytest.approx(share, abs=1e-12)
    assert abs(share - target) == pytest.approx(min(abs(s - target) for s in shares), abs=1e-12)
    level = levels[[s == pytest.approx(share, abs=1e-12) for s in shares].index(True)]
    for axis, layer in itertools.product(axes, range(3)):
        if axis == "hidden" and layer:
            continue
        units = ratios[axis][layer].tolist()
        expected = [i for i, v in enumerate(units) if v > level or v == max(units)]
        assert kept(decision.layout, axis, layer) == expected


def test_something_stays_everywhere() -> None:
    layout = decide(drawn(1), COUNTED, 0.99, multiple=0).layout
    assert numbers(layout, "group") == numbers(layout, "channel") == [1, 1, 1]
    assert numbers(layout, "hidden") == [1]
    assert numbers(decide(drawn(1), COUNTED, 0.93, multiple=8).layout, "hidden") == [8]


def test_nothing_goes_at_zero() -> None:
    decision = decide(drawn(2), COUNTED, 0.0, multiple=0)
    assert decision.sparsity == 0
    assert decision.layout.to_dict() == Layout.full(WIDTHS).to_dict()


def test_units_without_a_mask_stay() -> None:
    ratios = drawn(3)
    for axis in ("group", "channel"):
        ratios[axis][1] = torch.full_like(ratios[axis][1], math.inf)
    for multiple in (0, 8, 16):
        layout = decide(ratios, COUNTED, 0.5, multiple=multiple).layout
        assert layout.layers[1].keep == {}
        assert layout.layers[0].keep
        assert decide(ratios, COUNTED, 0.5, threshold="zero").layout.layers[1].keep == {}


def test_a_threshold_of_zero_is_that_of_the_paper() -> None:
    ratios = drawn(4)
    ratios["channel"][2] = -ratios["channel"][2].abs() - 1  # one stays all the same
    decision = decide(ratios, COUNTED, 0.2, threshold="zero", multiple=0)
    for axis, layer in (*itertools.product(("group", "channel"), range(3)), ("hidden", 0)):
        units = ratios[axis][layer].tolist()
        expected = [i for i, v in enumerate(units) if v > 0 or v == max(units)]
        assert kept(decision.layout, axis, layer) == expected
    assert decision.sparsity == pytest.approx(1 - decoder(decision.layout) / TOTAL)


def nearest(number: int, size: int, multiple: int) -> int:
    found = math.floor((number + multiple / 2) / multiple) * multiple
    return size if found > size else min(max(found, multiple), size)


def top(values: Tensor, number: int) -> list[int]:
    return sorted(sorted(range(len(values)), key=lambda i: -values[i].item())[:number])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.floats(0, 0.6), st.sampled_from([2, 8, 64]))
def test_dimensions_become_multiples(seed: int, target: float, multiple: int) -> None:
    ratios = drawn(seed)
    decision = decide(ratios, COUNTED, target, multiple=multiple)
    # hidden: at least a multiple stays in the first search, and its number is rounded
    floor = {**ratios, "hidden": [ratios["hidden"][0].clone()]}
    floor["hidden"][0][top(ratios["hidden"][0], multiple)] = math.inf
    first = decide(floor, COUNTED, target, multiple=0)
    assert decision.before == first.sparsity
    hidden = nearest(numbers(first.layout, "hidden")[0], 36, multiple)
    assert kept(decision.layout, "hidden") == top(ratios["hidden"][0], hidden)
    # then the threshold is found again over groups and channels, in a model of that many features
    second = decide_groups_and_channels(ratios, hidden, target)
    for layer in range(3):
        groups, channels = second[layer]
        assert kept(decision.layout, "group", layer) == groups
        expected = top(ratios["channel"][layer], nearest(len(channels), 20, multiple))
        assert kept(decision.layout, "channel", layer) == expected
    assert decision.sparsity == pytest.approx(1 - decoder(decision.layout) / TOTAL)


def decide_groups_and_channels(
    ratios: Units, hidden: int, target: float
) -> list[tuple[list[int], list[int]]]:
    levels = sorted({v for a in ("group", "channel") for t in ratios[a] for v in t.tolist()})
    found: list[tuple[float, list[tuple[list[int], list[int]]]]] = []
    for level in (-math.inf, *levels):
        widths = WIDTHS.copy()
        widths.shared["hidden"] = hidden
        keep = []
        for layer in range(3):
            stay: dict[str, list[int]] = {}
            for axis in ("group", "channel"):
                units = ratios[axis][layer].tolist()
                stay[axis] = [i for i, v in enumerate(units) if v > level or v == max(units)]
                widths.layers[layer][axis] = len(stay[axis])
            keep.append((stay["group"], stay["channel"]))
        found.append((abs(1 - count(LABELS, widths, decoder=True) / TOTAL - target), keep))
    return min(found, key=lambda entry: entry[0])[1]


def test_a_number_that_is_a_multiple_stays_and_the_original_is_not_exceeded() -> None:
    wide = WIDTHS.copy()
    wide.shared["hidden"] = 40
    counted = DecoderCount(LABELS, wide)
    for target in (0.0, 0.05):
        decision = decide(drawn(0, widths=wide), counted, target, multiple=16)
        assert len(kept(decision.layout, "hidden")) in {32, 40}
    layout = decide(drawn(0, widths=wide), counted, 0.3, multiple=64).layout
    assert numbers(layout, "hidden") == [40]
    assert numbers(layout, "channel") == [20, 20, 20]


def test_stock_takes_the_same_number_from_every_layer() -> None:
    for seed, multiple in itertools.product(range(5), (0, 4)):
        ratios = drawn(seed)
        decision = decide(ratios, COUNTED, 0.4, multiple=multiple, stock=True)
        for axis in ("group", "channel"):
            (number,) = set(numbers(decision.layout, axis))
            for layer in range(3):
                assert kept(decision.layout, axis, layer) == top(ratios[axis][layer], number)
        assert decision.sparsity == pytest.approx(1 - decoder(decision.layout) / TOTAL)
        if not multiple:
            assert decision.sparsity == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize(
    ("axes", "target", "text"),
    [
        (("channel",), 0.5, "cutting channel can reach, got 0.5; the most is 0.297"),
        (("group", "channel"), 0.9, "cutting group and channel can reach, got 0.9"),
    ],
)
def test_a_target_out_of_reach_is_refused(axes: Any, target: float, text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        decide(drawn(0, axes), COUNTED, target)
    assert "\n" not in str(caught.value)


def test_masks_that_are_no_numbers_are_refused() -> None:
    ratios = drawn(0)
    ratios["channel"][1][3] = math.nan
    with pytest.raises(UserError, match="expected finite masks, got NaN"):
        decide(ratios, COUNTED, 0.3)
