"""Slopes against perturbed copies and autograd; noise that comes back; weights that stay."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.gradients.spsa import GateNoise, WeightNoise, loss_slopes, normal
from lit_prune.methods.zeroth_order import scored_parts
from lit_prune.structure import Structure
from lit_prune.structure.coupling import parameter_names
from tests.spsa_cases import BOTH, cosine, loss, samples
from tests.structure.tiny import tiny_model

FAMILIES = ["llama", "phi3", "gpt2", "bloom", "falcon-new", "opt"]


def names_of(model: Any, axes: Sequence[str], layer: int | None = None) -> list[str]:
    found = scored_parts(model, Structure.of(model), axes)
    layers = range(len(found)) if layer is None else [layer]
    return parameter_names(model, [part for number in layers for part in found[number]])


def noise_of(model: Any, axes: Sequence[str] = BOTH, seed: int = 3) -> WeightNoise:
    return WeightNoise(model, names_of(model, axes), seed)


def literal_slopes(model: Any, noise: WeightNoise, names: list[str], scale: float) -> list[float]:
    """Of copies whose weights are all perturbed at once."""
    slopes = []
    for number, batch in samples(3):
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for name in names:
                    weight = moved.get_parameter(name)
                    z = normal(weight.shape, "cpu", noise.seed, number, name)
                    weight.copy_((weight.float() + sign * scale * z).to(weight.dtype))
                values.append(float(loss(moved, batch)))
        slopes.append((values[0] - values[1]) / (2 * scale))
    return slopes


@pytest.mark.parametrize("axes", [("channel",), ("group",), BOTH])
@pytest.mark.parametrize("name", FAMILIES)
def test_slopes_are_those_of_perturbed_copies(name: str, axes: tuple[str, ...]) -> None:
    model = tiny_model(name)
    noise = noise_of(model, axes)
    names = names_of(model, axes)
    found = loss_slopes(model, samples(3), noise, 3, 0.01)
    # a mean of float32 losses is off by 2e-7, and that by 50 for 1 / 2ε
    expected = literal_slopes(model, noise, names, 0.01)
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found.dtype == torch.float32


def test_only_what_the_axes_own_is_perturbed() -> None:
    model = tiny_model("llama")
    assert names_of(model, ("channel",), 1) == [
        f"model.layers.1.mlp.{name}"
        for name in (
            *("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"),
            "down_proj.weight",
        )
    ]
    query = names_of(model, ("query",), 0)
    assert [name.split(".")[4] for name in query] == ["q_proj", "q_proj", "o_proj"]


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_stay_as_they_were_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    before, places = copy.deepcopy(model.state_dict()), pointers(model)
    model.train()
    moved = loss_slopes(model, samples(2), noise_of(model), 2, 1e-2)
    assert moved.count_nonzero() == 2
    assert model.training
    assert pointers(model) == places
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["weights", "gates"])
def test_after_an_error_the_model_is_as_it_was(kind: str) -> None:
    model = tiny_model("llama")
    places, before = pointers(model), copy.deepcopy(model.state_dict())
    gates = GateNoise(model, Structure.of(model), BOTH, 0)
    noise = noise_of(model) if kind == "weights" else gates

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss_slopes(model, samples(1), noise, 1, 0.1)
    handle.remove()
    assert pointers(model) == places
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_one_module_is_perturbed_at_a_time() -> None:
    model = tiny_model("llama")
    places, moved = pointers(model), []

    def look(module: nn.Module, *_: Any) -> None:
        moved.append({name for name, place in pointers(model).items() if place != places[name]})

    for module in model.modules():
        module.register_forward_hook(look)
    loss_slopes(model, samples(1), noise_of(model), 1, 1e-3)
    expected: dict[str, set[str]] = {}
    for name in names_of(model, BOTH):
        expected.setdefault(name.rpartition(".")[0], set()).add(name)
    assert len(expected) == 21
    assert all(names in [set(), *expected.values()] for names in moved)
    assert all(moved.count(names) == 2 for names in expected.values())


@pytest.mark.parametrize("kind", ["weights", "gates"])
def test_no_graph_is_built(kind: str) -> None:
    model = tiny_model("llama").requires_grad_(True)
    gates = GateNoise(model, Structure.of(model), BOTH, 0)
    noise = noise_of(model) if kind == "weights" else gates
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        if isinstance(found, Tensor):
            seen.append(torch.is_grad_enabled() or found.requires_grad)

    for module in model.modules():
        module.register_forward_hook(look)
    with torch.enable_grad():
        slopes = loss_slopes(model, samples(1), noise, 1, 1e-3)
        assert torch.is_grad_enabled()
    assert len(seen) > 20
    assert not any(seen)
    assert not slopes.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_replayed_noise_is_the_noise_that_was_there() -> None:
    """With weights of zero and a step of one, the perturbed weights are the noise."""
    model = tiny_model("llama")
    names = names_of(model, BOTH)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).zero_()
    stored: list[dict[str, Tensor]] = []

    def look(module: nn.Module, *_: Any) -> None:
        for name, parameter in model.named_parameters():
            if name in names and parameter.count_nonzero():
                stored[-1][name] = parameter.detach().clone()

    for module in model.modules():
        module.register_forward_hook(look)
    noise = noise_of(model)
    for number, batch in samples(2):
        stored.append({})
        with torch.no_grad(), noise.applied(number, 1.0):
            loss(model, batch)
    slopes = torch.tensor([0.5, -3.0])
    for name in names:
        expected = (0.5 * stored[0][name] - 3.0 * stored[1][name]) / 2
        assert torch.allclose(noise.gradient(name, slopes), expected, atol=1e-6)
        one = noise.gradient(name, torch.tensor([1.0]))
        assert torch.equal(one, stored[0][name])
    assert abs(float(torch.cat([z.flatten() for z in stored[0].values()]).std()) - 1) < 0.02


def test_noise_differs_by_seed_sample_and_tensor() -> None:
    draws = [normal((4,), "cpu", *key) for key in ((0, 0, "a"), (0, 1, "a"), (1, 0, "a"))]
    draws.append(normal((4,), "cpu", 0, 0, "b"))
    for i, one in enumerate(draws):
        assert all(torch.equal(one, other) == (i == j) for j, other in enumerate(draws))


def test_the_mean_turns_into_the_gradients_direction() -> None:
    model = tiny_model("llama", hidden_size=6, intermediate_size=4, num_hidden_layers=1)
    names = names_of(model, ("channel",))
    (_, batch), *_ = samples(1)
    loss(model, batch).backward()
    exact = []
    for name in names:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        exact.append(gradient)
    size = sum(gradient.numel() for gradient in exact)
    assert size == 80
    noise = noise_of(model, ("channel",))
    slopes = loss_slopes(model, [(number, batch) for number in range(800)], noise, 800, 1e-3)
    found = [
        cosine([noise.gradient(name, slopes[:n]) for name in names], exact) for n in (10, 80, 800)
    ]
    # the estimate's variance gives a cosine of about the root of n / (n + size)
    for n, value in zip((10, 80, 800), found, strict=True):
        assert value == pytest.approx((n / (n + size)) ** 0.5, abs=0.15)
    assert found[0] < found[1] < found[2]
    mean = noise.gradient(names[0], slopes)
    assert float(mean.norm() / exact[0].norm()) == pytest.approx(1, abs=0.2)  # and its length


def test_the_shares_of_processes_sum_to_the_whole() -> None:
    model = tiny_model("llama")
    whole = loss_slopes(model, samples(5), noise_of(model), 5, 1e-3)
    shares = [samples(5)[0::2], samples(5)[1::2]]
    parts = [loss_slopes(model, share, noise_of(model), 5, 1e-3) for share in shares]
    assert torch.equal(parts[0] + parts[1], whole)
    assert parts[0][1] == parts[1][0] == 0
    again = loss_slopes(model, samples(5), noise_of(model), 5, 1e-3)
    assert torch.equal(again, whole)
    other = loss_slopes(model, samples(5), noise_of(model, seed=4), 5, 1e-3)
    assert not torch.isclose(other, whole).any()


@pytest.mark.parametrize("kind", ["padding", "labels"])
def test_tokens_that_do_not_count_change_nothing(kind: str) -> None:
    model = tiny_model("llama")
    ((_, batch),) = samples(1)
    short = {name: tensor[:, :7] for name, tensor in batch.items()}
    if kind == "padding":
        long = {**batch, "attention_mask": (torch.arange(12) < 7).long()[None]}
    else:
        long = {**batch, "labels": batch["input_ids"].masked_fill(torch.arange(12) >= 7, -100)}
    one, two, other = (
        loss_slopes(model, [(0, x)], noise_of(model), 1, 0.01) for x in (short, long, batch)
    )
    assert torch.allclose(one, two, atol=1e-3)
    assert not torch.allclose(one, other, atol=1e-1)


def test_a_window_without_a_prediction_has_no_slope() -> None:
    model = tiny_model("llama")
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1)}
    assert loss_slopes(model, [(0, batch)], noise_of(model), 1, 1e-3).tolist() == [0]


def test_losses_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("inf")
    with pytest.raises(UserError, match="expected finite losses around the weights, got"):
        loss_slopes(model, samples(1), noise_of(model), 1, 1e-3)
