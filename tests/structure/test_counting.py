from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_prune.structure import Structure, Widths, cut, settle
from lit_prune.structure.counting import (
    count,
    count_actual,
    count_macs,
    unique_labels,
)
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("cutting", [False, True], ids=["dense", "cut"])
@pytest.mark.parametrize("name", FAMILIES)
def test_macs_are_those_that_torch_counts(name: str, cutting: bool) -> None:
    # in the eager implementation every product is a matmul that the counter sees
    model: Any = tiny_model(name, attn_implementation="eager")
    structure = Structure.of(model)
    if cutting:
        layout = varied(structure, cuttable(structure))
        cut(model, structure, layout)
        settle(model, structure, layout)
    length = 12
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 61, (1, length)), use_cache=False)
    macs = length * count_macs(model, structure, structure.widths, length)
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize("name", FAMILIES)
def test_no_weights_are_needed(name: str) -> None:
    model: Any = tiny_model(name)
    structure, empty = Structure.of_config(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    labels = unique_labels(empty, structure)
    assert count(labels, structure.widths) == sum(p.numel() for p in model.parameters())
    layers = structure.layers(model)
    decoder = count(labels, structure.widths, decoder=True)
    assert decoder == sum(p.numel() for p in layers.parameters())
    assert decoder == count_actual(model, structure, decoder=True)
    assert count_macs(empty, structure, structure.widths) == count_macs(
        model, Structure.of(model), structure.widths
    )


def test_a_tied_tensor_is_counted_once() -> None:
    model = tiny_model("llama-tied")
    structure = Structure.of(model)
    labels = unique_labels(model, structure)
    names = [label.name for label in labels]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert len(structure.labels(model)) == len(labels) + 1
    # a multiplication is no parameter: the head's count all the same
    assert count_macs(model, structure, structure.widths) > count(
        [label for label in labels if label.layer is not None and len(label.dims) == 2],
        structure.widths,
    )


@pytest.mark.parametrize("name", ["llama", "falcon-new", "gpt2"])
def test_expected_counts_can_be_differentiated(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    labels = unique_labels(model, structure)
    axes = [axis for axis in structure.axes() if axis != "layer"]
    for axis in axes:
        expected = structure.widths.copy()
        place = expected.shared if axis == "hidden" else expected.layers[1]
        size = torch.tensor(float(place[axis]), dtype=torch.float64, requires_grad=True)
        place[axis] = size
        for total, exact in (
            (count(labels, expected), lambda w: count(labels, w)),
            (
                count_macs(model, structure, expected, 5),
                lambda w: count_macs(model, structure, w, 5),
            ),
        ):
            (slope,) = torch.autograd.grad(total, size)
            assert total.item() == exact(structure.widths)
            # every axis stands once in a dimension, and hidden in one dimension of a tensor
            assert slope.item() == exact(structure.widths) - exact(_less(structure.widths, axis))


def _less(widths: Widths, axis: str) -> Widths:
    smaller = widths.copy()
    (smaller.shared if axis == "hidden" else smaller.layers[1])[axis] -= 1
    return smaller
