from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.masks.adaptation import GATED
from lit_prune.masks.bottleneck import Gates
from lit_prune.masks.gating import attach
from lit_prune.structure import Layout, Structure
from lit_prune.structure.gates import masked
from tests.structure.layouts import varied
from tests.structure.tiny import FAMILIES, tiny_model

RMS = {"llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "glm"}
RMS |= {"gemma2", "gemma2-untied", "gemma3"}


def tokens() -> Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def built(name: str, seed: int = 0, **options: Any) -> tuple[Any, Structure, Gates]:
    """A frozen model and gates far from their start."""
    model: Any = tiny_model(name).requires_grad_(False)
    structure = Structure.of(model)
    gates = Gates(structure.widths, GATED, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gates.mu.copy_(0.9 + 0.4 * torch.randn(len(gates.mu), generator=generator))
        gates.log_variance.copy_(torch.randn(len(gates.mu), generator=generator) - 1)
    return model, structure, gates


def gated(structure: Structure) -> list[str]:
    return [axis for axis in GATED if structure.widths.sizes(0)[axis] > 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_open_gates_without_noise_change_nothing(name: str) -> None:
    model, structure, gates = built(name)
    dense = logits(model)
    with torch.no_grad():
        gates.mu.fill_(1)
        gates.log_variance.fill_(-80)
    for mode in (True, False):
        gates.train(mode)
        with attach(gates, model, structure):
            found = logits(model)
        if name in RMS:
            assert torch.equal(found, dense)
        assert difference(found, dense) <= 2e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_itself_again_afterwards(name: str) -> None:
    model, structure, gates = built(name)
    dense = logits(model)
    with attach(gates, model, structure):
        assert difference(logits(model), dense) > 0.05
    assert torch.equal(logits(model), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_hard_masks_are_those_of_the_reference(name: str) -> None:
    model, structure, gates = built(name)
    layout = varied(structure, gated(structure))
    with masked(model, structure, layout):
        expected = logits(model)
    assert difference(expected, logits(model)) > 0.05
    with attach(gates, model, structure):
        soft = logits(model)
        with gates.holding(layout, weighted=False):
            assert difference(logits(model), expected) <= 1e-5
        assert torch.equal(logits(model), soft)


def outputs(module: nn.Module, gates: Gates, features: int, tokens: int = 4000) -> Tensor:
    """What a gated module that copies its input gives for ones, [tokens, features]."""
    gates.refresh()
    return module(torch.ones(tokens, features))


def identity(features: int) -> nn.Linear:
    linear = nn.Linear(features, features, bias=False).requires_grad_(False)
    linear.weight.data = torch.eye(features)
    return linear


@pytest.mark.parametrize(
    ("path", "axis"), [("self_attn.o_proj", "group"), ("mlp.down_proj", "channel")]
)
def test_noise_is_drawn_per_entry_and_means_are_shared(path: str, axis: str) -> None:
    model, structure, gates = built("llama")
    layer: Any = structure.layers(model)[1]
    parent, _, name = path.rpartition(".")
    features = layer.get_submodule(path).in_features
    setattr(layer.get_submodule(parent), name, identity(features))
    without = Gates(structure.widths, ["group", "channel"])
    without.mu.data, without.log_variance.data = (
        values[: len(without.mu)].clone() for values in (gates.mu.data, gates.log_variance.data)
    )
    module = layer.get_submodule(path)
    with attach(without, model, structure):
        z = outputs(module, without, features)
    # query heads of a KV group are neighbours: its mask is repeated for them, not tiled
    each = features // structure.widths.layers[1][axis]
    mu = without.split(without.mu)[axis, 1].repeat_interleave(each)
    sigma = (without.split(without.log_variance)[axis, 1] / 2).exp().repeat_interleave(each)
    assert torch.allclose(z.mean(0), mu, atol=0.12)
    assert torch.allclose(z.std(0) / sigma, torch.ones(features), atol=0.08)
    correlation = torch.corrcoef(((z - mu) / sigma).T) - torch.eye(features)
    assert correlation.abs().max() < 0.08
    without.eval()
    with attach(without, model, structure):
        assert torch.equal(outputs(module, without, features, 3), mu.expand(3, -1))


def test_every_write_has_noise_of_its_own() -> None:
    model, structure, gates = built("gpt2")
    seen: list[Tensor] = []
    sites = [s for s in structure.sites(model) if s.line.reads and "hidden" in s.line.writes]
    assert len(sites) == 8  # two embeddings, O and down of three layers
    with attach(gates, model, structure):
        for site in sites:
            model.get_submodule(site.path).register_forward_hook(
                lambda module, args, output: seen.append(output.detach().flatten(0, -2)[0])
            )
            model.get_submodule(site.path).weight.data.fill_(1)
        gates.refresh()
        for site in sites:
            module = model.get_submodule(site.path)
            if isinstance(module, nn.Embedding):
                module(torch.zeros(1, 1, dtype=torch.long))
            else:
                module.bias.data.zero_()
                module(torch.full((1, 1, module.nx), 1 / module.nx))
    hidden = gates.split(gates.mu)["hidden", None]
    noise = torch.stack(seen) - hidden
    # O and down read gated ones, so each is a multiple of its gates
    ratios = torch.stack(seen) / hidden
    assert noise.shape == (8, 32)
    assert not any(
        torch.allclose(ratios[i] / ratios[i, 0], ratios[j] / ratios[j, 0], rtol=1e-2)
        for i in range(8)
        for j in range(i)
    )


def test_noise_follows_rank_and_batch_and_nothing_else() -> None:
    model, structure, gates = built("llama")
    with attach(gates, model, structure):
        first = logits(model)
        torch.manual_seed(9)
        torch.randn(5)
        assert torch.equal(logits(model), first)
        for draw in ((0, 1), (1, 0)):
            gates.reseed(*draw)
            assert not torch.allclose(logits(model), first, atol=1e-2)
        gates.reseed(0, 0)
        assert torch.equal(logits(model), first)
    twin, other, again = built("llama")
    with attach(again, twin, other):
        assert torch.equal(logits(twin), first)
    state = torch.random.get_rng_state()
    with attach(gates, model, structure):
        logits(model)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon-new", "opt-factorised"])
@pytest.mark.parametrize("training", [True, False], ids=["noise", "means"])
def test_slopes_are_those_of_finite_differences(name: str, training: bool) -> None:
    model: Any = tiny_model(name, dtype=torch.float64).requires_grad_(False)
    structure = Structure.of(model)
    gates = built(name)[2].train(training)
    for parameter in gates.parameters():
        parameter.data = parameter.data.double()

    def loss() -> Tensor:
        return logits(model).log_softmax(-1)[..., 7].mean()

    with attach(gates, model, structure):
        loss().backward()
        generator = torch.Generator().manual_seed(0)
        moved = [gates.mu, gates.log_variance]
        # in a LayerNorm, too, log sigma^2 tells how far a feature is kept
        for parameter in moved if training or name not in RMS else moved[:1]:
            assert parameter.grad is not None
            step = torch.randn(len(parameter), generator=generator, dtype=torch.float64)
            values = []
            size, tolerance = (3e-4, 3e-3) if name in RMS else (1e-5, 1e-5)  # norms in float32
            for shift in (size, -size):
                with torch.no_grad():
                    parameter.add_(step, alpha=shift)
                    values.append(loss().item())
                    parameter.sub_(step, alpha=shift)
            slope = (values[0] - values[1]) / (2 * size)
            assert (parameter.grad @ step).item() == pytest.approx(slope, rel=tolerance, abs=1e-6)


def test_a_layer_norm_weighs_features_by_how_far_they_are_kept() -> None:
    model, structure, gates = built("gpt2")
    norm = model.get_submodule("transformer.h.0.ln_1")
    x = torch.randn(5, 32)
    with attach(gates, model, structure):
        gates.refresh()
        found = norm(x)
    keep = torch.sigmoid(10 * gates.split(gates.log_alpha())["hidden", None]).tolist()
    assert any(0.01 < p < 0.99 for p in keep)
    for row, out in zip(x.tolist(), found.tolist(), strict=True):
        mean = sum(p * v for p, v in zip(keep, row, strict=True)) / sum(keep)
        variance = sum(p * (v - mean) ** 2 for p, v in zip(keep, row, strict=True)) / sum(keep)
        for j, (p, v) in enumerate(zip(keep, row, strict=True)):
            normed = (v - mean) / math.sqrt(variance + norm.eps)
            expected = p * (normed * norm.weight[j].item() + norm.bias[j].item())
            assert out[j] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rms_norms_may_divide_by_the_kept_features_alone(name: str) -> None:
    model, structure, gates = built(name)
    layout = varied(structure, ["hidden"])
    assert layout.hidden is not None
    norm = model.get_submodule("model.layers.0.input_layernorm")
    x = torch.randn(5, 36)
    mask = torch.zeros(36).index_fill(0, layout.hidden, 1.0)
    plain = norm(x * mask)
    with attach(gates, model, structure), gates.holding(layout):
        gates.refresh()
        assert torch.equal(norm(x * mask), plain)
    with attach(gates, model, structure, norm_rescale="none"), gates.holding(layout):
        gates.refresh()
        found = norm(x * mask)
    weight = norm.weight + (1 if name == "gemma2" else 0)
    part = x[:, layout.hidden]
    expected = part / (part.square().mean(-1, keepdim=True)).sqrt() * weight[layout.hidden]
    assert torch.allclose(found[:, layout.hidden], expected, atol=1e-5)


def test_protected_layers_have_no_gates_of_their_own() -> None:
    model, structure, _ = built("llama")
    gates = Gates(structure.widths, ["group", "channel"], protected=[0])
    with attach(gates, model, structure):
        hooked = [name for name, m in model.named_modules() if m._forward_pre_hooks]
    assert hooked == [
        "",
        *(f"model.layers.{i}.{m}" for i in (1, 2) for m in ("self_attn.o_proj", "mlp.down_proj")),
    ]


def test_activations_keep_their_dtype_and_masks_theirs() -> None:
    model, structure, gates = built("llama")
    model.bfloat16()
    with attach(gates, model, structure):
        found = logits(model)
        found.float().mean().backward()
    assert found.dtype == torch.bfloat16
    for parameter in (gates.mu, gates.log_variance):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0).float().mean() > 0.9
        channels = gates.split(parameter.grad)["channel", 1]
        assert (channels.bfloat16() != channels).any(), "summed over tokens in float32"


def test_recomputed_activations_see_the_same_noise() -> None:
    slopes = []
    for recompute in (False, True):
        model, structure, gates = built("llama")
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with attach(gates, model, structure):
            logits(model).log_softmax(-1)[..., 7].mean().backward()
        assert gates.mu.grad is not None
        slopes.append(gates.mu.grad)
    assert torch.allclose(*slopes, atol=1e-6)


def test_what_stays_is_all_for_a_full_layout() -> None:
    model, structure, gates = built("llama")
    dense = logits(model)
    full = Layout.full(structure.widths)
    with attach(gates, model, structure), gates.holding(full, weighted=False):
        assert torch.equal(logits(model), dense)
