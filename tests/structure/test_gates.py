from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.structure import Layout, Structure
from lit_prune.structure.gates import masked
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model


@torch.no_grad()
def states(model: Any) -> tuple[Tensor, ...]:
    ids = torch.arange(3, 13)[None]
    return model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_itself_again_afterwards(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    before = states(model)
    with masked(model, structure, varied(structure, cuttable(structure))):
        assert not torch.equal(states(model)[-1], before[-1])
    with pytest.raises(KeyError), masked(model, structure, Layout.full(structure.widths)):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    before = states(model)
    with masked(model, structure, Layout.full(structure.widths)):
        assert all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_removed_features_of_the_stream_are_zero_everywhere(name: str) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    layout = varied(structure, ["hidden"])
    assert layout.hidden is not None
    removed = torch.ones(structure.widths.shared["hidden"], dtype=torch.bool)
    removed[layout.hidden] = False
    with masked(model, structure, layout):
        for state in states(model)[:-1]:
            assert not state[..., removed].any()
            assert state[..., ~removed].all()


def test_a_removed_layer_passes_its_input_on() -> None:
    model = tiny_model("llama")
    structure = Structure.of(model)
    with masked(model, structure, varied(structure, ["layer"])):
        found = states(model)
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])
