"""Roles against what a model does with them, not against the table that says where they lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.structure import Structure, cut
from lit_prune.structure.coupling import Part, parts
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model

LAYER = 1
GATED = [name for name in FAMILIES if not name.startswith(("gpt", "bloom", "falcon", "opt"))]
#: Queries and keys are normalized: a factor does not reach the scores, a sign does.
NORMALIZED = {"qwen3", "gemma3"}


def setup(name: str, *, narrow: bool = False) -> tuple[Any, Structure, dict[str, Part]]:
    """A float64 model, also after a cut that leaves other widths in each layer."""
    model = tiny_model(name, dtype=torch.float64)
    structure = Structure.of(model)
    if narrow:
        axes = [axis for axis in cuttable(structure) if axis not in ("hidden", "layer")]
        cut(model, structure, varied(structure, axes))
    return model, structure, {part.role: part for part in parts(model, structure, LAYER)}


IDS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def multiply(model: Any, part: Part, factor: Tensor | float) -> None:
    """Multiply a role's rows, [units...], biases too."""
    module = model.get_submodule(part.path)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    weight = weight.T if part.reads else weight
    index, factor = part.positions.flatten(), torch.as_tensor(factor).expand(part.positions.shape)
    weight[index] *= factor.flatten().unsqueeze(1)
    if not part.reads and module.bias is not None:
        module.bias[index] *= factor.flatten()


def factors(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return 0.5 + 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=1e-9))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_queries_may_grow_as_their_groups_keys_shrink(name: str, narrow: bool) -> None:
    model, _, found = setup(name, narrow=narrow)
    dense, groups = logits(model), len(found["key"].positions)
    sign = torch.ones(groups, dtype=torch.float64)
    sign[0] = -1
    factor = sign if name in NORMALIZED else sign * factors(groups)
    multiply(model, found["query"], factor.view(-1, 1, 1))
    assert not same(logits(model), dense)
    multiply(model, found["key"], 1 / factor.view(-1, 1))
    assert same(logits(model), dense)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_values_may_grow_as_their_outputs_shrink(name: str, narrow: bool) -> None:
    model, _, found = setup(name, narrow=narrow)
    dense, factor = logits(model), factors(*found["value"].positions.shape)
    multiply(model, found["value"], factor)
    assert not same(logits(model), dense)
    multiply(model, found["output"], 1 / factor.unsqueeze(1))
    assert same(logits(model), dense)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", GATED)
def test_up_is_what_may_grow_as_down_shrinks_and_not_the_gate(name: str, narrow: bool) -> None:
    model, _, found = setup(name, narrow=narrow)
    other, dense = copy.deepcopy(model), logits(model)
    factor = factors(len(found["up"].positions))
    for changed, role in ((model, "up"), (other, "gate")):
        multiply(changed, found[role], factor)
        multiply(changed, found["down"], 1 / factor)
    assert same(logits(model), dense)
    assert not same(logits(other), dense)


@contextmanager
def nudged(model: Any, part: Part, unit: Any, token: int) -> Iterator[None]:
    """Add noise to what some rows of a role put out at one token."""
    index = part.positions[unit].flatten()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(len(index), generator=generator, dtype=torch.float64)
        output.view(2, 7, -1)[:, token, index] += 1 + noise.abs()
        return output

    handle = model.get_submodule(part.path).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def seen(model: Any, part: Part) -> Tensor:
    """What the reader of a role's columns reads, [batch, tokens, units...]."""
    found: list[Tensor] = []
    module = model.get_submodule(part.path)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0].view(2, 7, -1)))
    logits(model)
    handle.remove()
    return found[0][..., part.positions]


def changes(model: Any, writer: Part, unit: Any, reader: Part, token: int = 2) -> Tensor:
    """Where a reader sees a change at one token of some rows, [tokens, units...]."""
    before = seen(model, reader)
    with nudged(model, writer, unit, token):
        return (seen(model, reader) - before).abs().amax(0) > 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_a_query_head_reaches_its_own_token_and_its_own_columns(name: str) -> None:
    model, _, found = setup(name)
    groups, queries, *_ = found["query"].positions.shape
    for unit in [(0, 0), (groups - 1, queries - 1)]:
        map_ = changes(model, found["query"], unit, found["output"])
        assert map_[2][unit].all()
        map_[2][unit] = False
        assert not map_.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_reaches_later_tokens_and_all_columns_of_its_group(name: str) -> None:
    model, _, found = setup(name)
    group = len(found["key"].positions) - 1
    map_ = changes(model, found["key"], group, found["output"])
    assert map_[2:5, group].all(), "five tokens are in each window"
    map_[2:, group] = False
    assert not map_.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_value_entry_reaches_that_entry_of_each_head_of_its_group(name: str) -> None:
    model, _, found = setup(name)
    for unit in [(0, 1), tuple(n - 1 for n in found["value"].positions.shape)]:
        map_ = changes(model, found["value"], unit, found["output"])
        assert map_[2:5, unit[0], :, unit[1]].all()
        map_[2:, unit[0], :, unit[1]] = False
        assert not map_.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_channels_rows_reach_its_own_column(name: str) -> None:
    model, _, found = setup(name)
    assert ("gate" in found) == (name in GATED)
    for role in {"gate", "up"} & set(found):
        for unit in (0, len(found[role].positions) - 1):
            map_ = changes(model, found[role], unit, found["down"])
            assert map_[2, unit]
            map_[2, unit] = False
            assert not map_.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_without_values_adds_nothing(name: str) -> None:
    model, _, found = setup(name)
    silent = torch.ones(len(found["value"].positions), 1)
    silent[0] = 0
    multiply(model, found["value"], silent)
    columns = seen(model, found["output"])
    assert not columns[:, :, 0].any()
    assert columns[:, :, 1:].abs().amax((0, 1)).bool().all()


def test_a_table_that_names_other_writers_is_an_error() -> None:
    model, structure, _ = setup("llama")
    structure.lines = [(path, line) for path, line in structure.lines if "k_proj" not in path]
    with pytest.raises(ValueError, match="expected writers of query, key, value, got 2"):
        parts(model, structure, LAYER)
