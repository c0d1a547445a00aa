"""Slopes of gates against scaled copies and autograd; which windows are whose."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.gradients.spsa import GateNoise, loss_slopes, windows
from lit_prune.structure import Structure
from tests.literal_fasp import columns
from tests.spsa_cases import BOTH, cosine, loss, samples
from tests.structure.tiny import tiny_model


def scaled_copy(model: Any, structure: Structure, axes: Any, by: Any) -> Any:
    """A copy in which the columns of each unit are multiplied instead of the inputs."""
    moved = copy.deepcopy(model)
    for layer, sizes in enumerate(structure.widths.layers):
        for axis in axes:
            path = structure.readers(model, axis, layer)[0].path
            weight = columns(moved, path)
            eta = by(layer, axis).flatten()
            entries = weight.shape[1] // len(eta)
            heads = sizes["query"] if axis == "group" else 1
            assert entries == (1 if axis == "channel" else sizes["value"] * heads)
            for column in range(weight.shape[1]):
                weight[:, column] *= 1 + eta[column // entries]
    return moved


GATED = [
    ("llama", BOTH),
    ("llama", ("query", "channel")),
    ("gpt2", BOTH),
    ("falcon-7b", ("query",)),
]


@pytest.mark.parametrize(("name", "axes"), GATED)
def test_gates_scale_what_units_put_out(name: str, axes: tuple[str, ...]) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    noise = GateNoise(model, structure, axes, 1)
    found = loss_slopes(model, samples(2), noise, 2, 0.1)
    for number, batch in samples(2):
        one_hot = 2 * torch.eye(2)[number]  # picks a sample's noise
        values = []
        for sign in (0.1, -0.1):

            def by(layer: int, axis: str, sign: float = sign, pick: Tensor = one_hot) -> Tensor:
                return sign * noise.gradient(layer, axis, pick)

            with torch.no_grad():
                values.append(float(loss(scaled_copy(model, structure, axes, by), batch)))
        assert found[number].item() == pytest.approx((values[0] - values[1]) / 0.2, abs=1e-4)


def test_the_mean_over_gates_turns_into_their_gradient() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    structure = Structure.of(model)
    (_, batch), *_ = samples(1)
    slots: dict[str, Tensor] = {}

    def keep(axis: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            slots[axis] = args[0]

        return hook

    handles = [
        model.get_submodule(structure.readers(model, axis, 0)[0].path).register_forward_pre_hook(
            keep(axis)
        )
        for axis in BOTH
    ]
    loss(model, batch).backward()
    for handle in handles:
        handle.remove()
    exact = []
    for axis, units in (("group", 2), ("channel", 20)):
        gradient = slots[axis].grad
        assert gradient is not None
        exact.append((slots[axis] * gradient).detach().flatten(0, 1).sum(0).view(units, -1).sum(1))
    noise = GateNoise(model, structure, BOTH, 0)
    slopes = loss_slopes(model, [(number, batch) for number in range(300)], noise, 300, 1e-2)
    found = [
        cosine([noise.gradient(0, axis, slopes[:n]) for axis in BOTH], exact) for n in (5, 300)
    ]
    assert found[0] < 0.9 < found[1]


def test_windows_keep_their_number_over_processes() -> None:
    ids = torch.arange(20).view(10, 2)
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids.split(4)]
    whole = windows(batches, 9, 4)
    assert [number for number, _ in whole] == list(range(9))
    shares = [windows(batches[rank::2], 9, 4, rank=rank, world=2) for rank in (0, 1)]
    assert [[number for number, _ in share] for share in shares] == [
        [0, 1, 2, 3, 8],
        [4, 5, 6, 7],
    ]
    for number, window in whole + shares[0] + shares[1]:
        assert torch.equal(window["input_ids"], ids[number : number + 1])
        assert window["attention_mask"].shape == (1, 2)
