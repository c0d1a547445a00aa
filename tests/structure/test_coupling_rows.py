"""Rows of each role: which entries they are, and what a unit owns of them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_prune.allocation.plan import axes_of
from lit_prune.structure import Layout, Structure, cut
from lit_prune.structure.counting import unique_labels
from lit_prune.structure.coupling import ROLES, Part, blocks, names_of, parts, per_unit, view
from lit_prune.structure.dims import parse
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model

LAYER = 1
#: Where one module writes several roles.
FUSED = {"phi3", "gpt2", "gpt_neox", "bloom", "falcon-new", "falcon-7b", "falcon-rw"}


def setup(name: str, *, narrow: bool = False) -> tuple[Any, Structure, dict[str, Part]]:
    """A model, also after a cut that leaves other widths in each layer."""
    model = tiny_model(name)
    structure = Structure.of(model)
    if narrow:
        axes = [axis for axis in cuttable(structure) if axis not in ("hidden", "layer")]
        cut(model, structure, varied(structure, axes))
    return model, structure, {part.role: part for part in parts(model, structure, LAYER)}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_those_of_the_modules_in_the_shape_of_their_units(name: str, narrow: bool) -> None:
    model, structure, found = setup(name, narrow=narrow)
    sizes = structure.widths.sizes(LAYER)
    groups, queries, d = sizes["group"], sizes["query"], sizes["hidden"]
    expected = {
        "query": (groups, queries, sizes["head_dim"]),
        "key": (groups, sizes["head_dim"]),
        "value": (groups, sizes["value"]),
        "output": (groups, queries, sizes["value"]),
        "gate": (sizes["channel"],),
        "up": (sizes["channel"],),
        "down": (sizes["channel"],),
    }
    tensors = {key: value.detach() for key, value in model.named_parameters()}
    rows = view(model, structure, LAYER, tensors)
    assert rows.keys() == found.keys()
    assert view(model, structure, LAYER, tensors, list(found.values())).keys() == rows.keys()
    for role, part in found.items():
        module = model.get_submodule(part.path)
        biased = not part.reads and f"{part.path}.bias" in tensors
        assert rows[role].shape == (*expected[role], d + biased)
        matrix = tensors[f"{part.path}.weight"]
        matrix = matrix.T if isinstance(module, Conv1D) else matrix
        for unit in ((0,) * part.positions.dim(), tuple(n - 1 for n in part.positions.shape)):
            place = int(part.positions[unit])
            literal = (matrix[:, place] if part.reads else matrix[place]).tolist()
            literal += [tensors[f"{part.path}.bias"][place].item()] if biased else []
            assert rows[role][unit].tolist() == literal


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_lie_together_are_views(name: str) -> None:
    model, structure, found = setup(name)
    tensors = {key: value.detach() for key, value in model.named_parameters() if "bias" not in key}
    rows = view(model, structure, LAYER, tensors)
    for role, part in found.items():
        flat = part.positions.flatten()
        together = bool((flat.diff() == 1).all())
        storage = tensors[f"{part.path}.weight"].untyped_storage().data_ptr()
        assert (rows[role].untyped_storage().data_ptr() == storage) == together
        if name not in FUSED or part.reads:
            assert together
    if name in {"phi3", "glm", "gpt2"}:  # one segment after the other
        assert all((part.positions.flatten().diff() == 1).all() for part in found.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_unit_owns_what_goes_when_it_is_cut(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    offset = 1
    for parameter in model.parameters():
        parameter.data.copy_(torch.arange(offset, offset + parameter.numel()).view_as(parameter))
        offset += parameter.numel()
    assert offset < 2**24, "float32 holds each number"
    tensors = {key: value.detach() for key, value in model.named_parameters()}
    rows = view(model, structure, LAYER, tensors)
    before = numbers(model)
    for axis in set(ROLES) & set(cuttable(structure)):
        owned = per_unit(rows, axis)
        assert set(owned) <= set(ROLES[axis])
        sizes = structure.widths.sizes(LAYER)
        unit, group = sizes[axis] - 1, sizes["group"] - 1
        (table,) = axes_of(unique_labels(model, structure), structure.widths, [axis], [])
        if axis in ("channel", "group"):
            keep = torch.arange(unit)
            mine = [tensor[unit] for tensor in owned.values()]
            assert sum(len(entries) for entries in mine) == table.costs[LAYER]
        else:  # the first goes from each group but the last, and the last from that
            keep = torch.arange(unit).expand(sizes["group"], -1) + 1
            keep = torch.where(torch.arange(sizes["group"])[:, None] == group, keep - 1, keep)
            mine = [tensor[:-1, 0].flatten() for tensor in owned.values()]
            mine += [tensor[group, unit] for tensor in owned.values()]
            assert sum(len(entries) for entries in mine) == table.costs[LAYER]
        smaller, left = copy.deepcopy(model), Structure.of(model)
        cut(smaller, left, Layout.full(left.widths).replace_layer(LAYER, {axis: keep}))
        gone = before - numbers(smaller)
        found = [number for entries in mine for number in entries.tolist()]
        assert len(found) == len(set(found))
        assert set(found) == gone


def numbers(model: nn.Module) -> set[float]:
    return {number for parameter in model.parameters() for number in parameter.flatten().tolist()}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_are_those_of_parameters_with_units_of_the_layer(name: str) -> None:
    model, structure, _ = setup(name)
    expected = [
        label.name
        for label in structure.labels(model, LAYER)
        if label.layer == LAYER
        and any(a in dim for dim in label.dims for a in ("group", "channel"))
    ]
    found = names_of(model, structure, LAYER)
    assert sorted(found) == sorted(expected)
    assert len(found) == len(set(found))


SIZES = {"group": 2, "query": 3, "head_dim": 4, "value": 5, "channel": 6}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("channel", [(("channel",), lambda c: c)]),
        ("channel + channel", [(("channel",), lambda c: c), (("channel",), lambda c: 6 + c)]),
        (
            "(group 3 head_dim)",
            [(("group", "head_dim"), lambda g, k, i=i: (3 * g + i) * 4 + k) for i in range(3)],
        ),
        (
            "(2 group head_dim) + (group value)",
            [
                (("group", "head_dim"), lambda g, k: 4 * g + k),
                (("group", "head_dim"), lambda g, k: 8 + 4 * g + k),
                (("group", "value"), lambda g, v: 16 + 5 * g + v),
            ],
        ),
        (
            "(group (query + 1 + 1) head_dim)",
            [
                (("group", "query", "head_dim"), lambda g, q, k: (5 * g + q) * 4 + k),
                (("group", "head_dim"), lambda g, k: (5 * g + 3) * 4 + k),
                (("group", "head_dim"), lambda g, k: (5 * g + 4) * 4 + k),
            ],
        ),
        ("2 + channel", [((), lambda: 0), ((), lambda: 1), (("channel",), lambda c: 2 + c)]),
    ],
)
def test_blocks(text: str, expected: list[tuple[tuple[str, ...], Callable[..., int]]]) -> None:
    dim = parse(text).writes
    found = blocks(dim, SIZES)
    assert [block.names for block in found] == [names for names, _ in expected]
    for block, (names, where) in zip(found, expected, strict=True):
        assert block.positions.shape == tuple(SIZES[name] for name in names)
        for unit in itertools.product(*map(range, block.positions.shape)):
            assert int(block.positions[unit]) == where(*unit)
    total = torch.cat([block.positions.flatten() for block in found]).sort().values
    assert total.tolist() == list(range(dim.size(SIZES)))
