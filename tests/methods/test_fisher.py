"""Fisher scores against one backward pass for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.methods.fisher import fisher_scores
from lit_prune.structure import Structure
from tests.structure.tiny import tiny_model

Batch = dict[str, Tensor]


def batches(*, padded: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (2, 2, 7), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 1, 4:] = 0
    return [{"input_ids": x, "attention_mask": m} for x, m in zip(ids * mask, mask, strict=True)]


def literal(model: Any, path: str, data: list[Batch]) -> Tensor:
    """F of each entry: gates of their own for every window, token and feature, [features]."""
    total = torch.zeros(0)
    for batch in data:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row = ids[mask.bool()][None]
            gates: list[Tensor] = []

            def gate(module: Any, args: Any, gates: list[Tensor] = gates) -> Any:
                gates.append(torch.ones_like(args[0], requires_grad=True))
                return (args[0] * gates[0], *args[1:])

            handle = model.get_submodule(path).register_forward_pre_hook(gate)
            logits = model(input_ids=row, use_cache=False).logits[0]
            handle.remove()
            loss = torch.zeros(())
            for t in range(row.shape[1] - 1):
                loss = loss + torch.nn.functional.cross_entropy(logits[t], row[0, t + 1])
            (slope,) = torch.autograd.grad(loss, gates)
            for token in slope[0]:
                squares = torch.tensor([float(x) ** 2 for x in token])
                total = squares if not len(total) else total + squares
    return total


CASES = [
    ("llama", "channel", 1),
    ("llama", "group", 24),
    ("llama", "query", 8),
    ("phi3", "group", 18),
    ("gpt2", "channel", 1),
    ("gpt2", "group", 8),
    ("falcon-7b", "query", 8),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("name", "axis", "entries"), CASES)
def test_a_unit_scores_the_squared_slopes_of_its_gates(
    name: str, axis: str, entries: int, padded: bool
) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    found = fisher_scores(model, structure, batches(padded=padded), [axis])
    assert list(found) == [axis]
    assert len(found[axis]) == 3
    path = structure.readers(model, axis, 1)[0].path
    sums = literal(model, path, batches(padded=padded)).view(-1, entries).sum(1)
    assert found[axis][1].dim() == (2 if axis == "query" else 1)
    assert torch.allclose(found[axis][1].flatten(), sums, rtol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_shares_of_processes_sum_to_the_whole() -> None:
    model = tiny_model("llama")
    structure, axes = Structure.of(model), ["group", "channel"]
    whole = fisher_scores(model, structure, batches(padded=True), axes)
    data = batches(padded=True)
    first = fisher_scores(model, structure, data[:1], axes)
    second = fisher_scores(model, structure, data[1:], axes)
    nothing = fisher_scores(model, structure, [], axes)
    for axis in axes:
        for layer in range(3):
            parts = first[axis][layer] + second[axis][layer]
            assert torch.allclose(parts, whole[axis][layer], rtol=1e-4)
            assert nothing[axis][layer].count_nonzero() == 0
    calls: list[Tensor] = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        return 2 * tensor

    twice = fisher_scores(model, structure, data, axes, reduce=reduce)
    assert len(calls) == 6
    assert torch.allclose(twice["group"][2], 2 * whole["group"][2])
