from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.gradients.folded import weight_gradients
from lit_prune.methods.unshared import unshared
from lit_prune.scores import coupled
from lit_prune.scores.coupled import Products, component_scores, head_scores
from lit_prune.structure import Structure
from lit_prune.structure.coupling import view
from tests import literal_coupled
from tests.structure.tiny import tiny_model

Rows = dict[str, Tensor]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def factors(seed: int, rows: int = 7, columns: int = 6, components: int = 4) -> list[Tensor]:
    """x, y, a, b, with gradients large enough that the second order counts."""
    sizes = (rows, columns, rows, columns)
    return [draw(components, n, seed=4 * seed + i) for i, n in enumerate(sizes)]


def consistent(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Factors whose gradients come from a matrix: a = G y and b = Gᵀ x; and those matrices."""
    x, y, *_ = factors(seed)
    matrices = list(draw(4, 7, 6, seed=seed + 99))
    a = torch.stack([g @ row for g, row in zip(matrices, y, strict=True)])
    b = torch.stack([g.T @ row for g, row in zip(matrices, x, strict=True)])
    return [x, y, a, b], matrices


@pytest.mark.parametrize("seed", range(3))
def test_importance_is_that_of_the_explicit_matrix(seed: int) -> None:
    four = factors(seed)
    found = Products.of(*four)
    for i, one in enumerate(zip(*four, strict=True)):
        terms = literal_coupled.matrix(*one)
        assert float(found.first[i]) == pytest.approx(float(terms.sum()))
        explicit = torch.outer(found.u[i], found.z[i]) + torch.outer(found.v[i], found.w[i])
        torch.testing.assert_close(explicit, terms)
        assert float(found.importance()[i]) == pytest.approx(literal_coupled.importance(*one))
        # neither order is lost in the other
        assert 0.01 < abs(float(terms.sum())) / float(terms.square().sum()) < 100


@pytest.mark.parametrize("seed", range(3))
def test_the_matrix_is_the_smallest_with_those_gradients(seed: int) -> None:
    """The minimum-norm solution of G y = a, Gᵀ x = b as a system of linear equations."""
    four, _ = consistent(seed)
    for x, y, a, b in zip(*four, strict=True):
        rows = torch.kron(torch.eye(7, dtype=x.dtype), y[None])
        columns = torch.kron(x[None], torch.eye(6, dtype=x.dtype))
        system, right = torch.cat([rows, columns]), torch.cat([a, b])
        solved = torch.linalg.lstsq(system, right[:, None], driver="gelsd", rcond=1e-10).solution
        torch.testing.assert_close((system @ solved).flatten(), right)
        expected = solved.view(7, 6) * torch.outer(x, y)
        torch.testing.assert_close(literal_coupled.matrix(x, y, a, b), expected)


@pytest.mark.parametrize("seed", range(3))
def test_where_the_gradients_agree_both_scales_have_the_same_slope(seed: int) -> None:
    (x, y, a, b), matrices = consistent(seed)
    found = Products.of(x, y, a, b)
    for slopes in found.slopes:
        torch.testing.assert_close(slopes.sum(-1), found.first)
    exact = [float((g * torch.outer(p, q)).sum()) for g, p, q in zip(matrices, x, y, strict=True)]
    torch.testing.assert_close(found.first, torch.tensor(exact, dtype=x.dtype))


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (7, 6), (6, 7), (7, 7)])
def test_features_are_those_of_the_explicit_matrix(rows: int, columns: int) -> None:
    """Six features; a seventh entry is a bias, whose row or column is none of them."""
    four = factors(5, rows, columns)
    expected = literal_coupled.features(list(zip(*four, strict=True)), 6)
    torch.testing.assert_close(Products.of(*four).feature_importance(6), expected)


@pytest.mark.parametrize("place", [0, 1])
def test_a_component_without_a_factor_has_no_importance(place: int) -> None:
    four = factors(1)
    four[place][2] = 1e-9
    found = Products.of(*four)
    assert found.importance()[2] == 0
    assert (found.importance()[[0, 1, 3]] > 0).all()
    without = [torch.cat([x[:2], x[3:]]) for x in four]
    expected = Products.of(*without).feature_importance(6)
    torch.testing.assert_close(found.feature_importance(6), expected)


def rows_of(seed: int, *, gate: bool = True, bias: bool = False) -> tuple[Rows, Rows]:
    """Weights and gradients of a layer: 3 heads of 4, 11 channels, 6 features."""
    wide = 6 + bias
    shapes = {
        "query": (3, 1, 4, wide),
        "key": (3, 4, wide),
        "value": (3, 4, wide),
        "output": (3, 1, 4, 6),
        "gate": (11, wide),
        "up": (11, wide),
        "down": (11, 6),
    }
    if not gate:
        del shapes["gate"]
    named = enumerate(shapes.items(), 20 * seed)
    both = [
        (name, draw(*shape, seed=i), draw(*shape, seed=i + 9, scale=0.3))
        for i, (name, shape) in named
    ]
    return {name: w for name, w, _ in both}, {name: g for name, _, g in both}


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_scores_as_loops_do(monkeypatch: Any, gate: bool, bias: bool) -> None:
    monkeypatch.setattr(coupled, "_ENTRIES", 24)  # four channels at once
    weights, gradients = rows_of(3, gate=gate, bias=bias)
    found = component_scores(weights, gradients)
    expected = literal_coupled.component_scores(weights, gradients)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_only_what_is_asked_for_is_scored() -> None:
    weights, gradients = rows_of(3)
    whole = component_scores(weights, gradients)
    for axes, names in (
        (("channel",), {"channel"}),
        (("group",), {"head"}),
        (("query", "channel"), {"head", "channel"}),
        (("hidden",), {"hidden"}),
    ):
        found = component_scores(weights, gradients, axes)
        assert found.keys() == names
        assert all(torch.equal(found[name], whole[name]) for name in names)


def test_half_precision_is_scored_in_float32() -> None:
    weights, gradients = rows_of(3)
    short = [{k: v.bfloat16() for k, v in x.items()} for x in (weights, gradients)]
    found = component_scores(short[0], short[1])
    wide = [{k: v.float() for k, v in x.items()} for x in short]
    expected = component_scores(wide[0], wide[1])
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], tensor)


def test_shared_keys_are_refused() -> None:
    weights, gradients = rows_of(3)
    weights["query"] = weights["query"].expand(-1, 2, -1, -1)
    with pytest.raises(ValueError, match="keys for each query head, got 2 heads that share them"):
        component_scores(weights, gradients)


def test_heads_are_sums_over_their_components() -> None:
    components = draw(6, 5)
    found = head_scores(components, 2, "query")
    assert found.shape == (2, 3)
    assert float(found[1, 2]) == pytest.approx(sum(components[5].tolist()))
    assert float(head_scores(components, 2, "group")[1]) == pytest.approx(
        sum(sum(row.tolist()) for row in components[3:])
    )


def tokens(rows: int = 2, length: int = 10, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def collect(model: nn.Module, structure: Structure, layer: int) -> tuple[Rows, Rows]:
    """A layer's weights and gradients by role."""
    kept: list[tuple[Rows, Rows]] = []

    def fold(batch: int, loss: float, number: int, weights: Rows, gradients: Rows) -> None:
        if number == layer:
            copies = [{k: v.clone() for k, v in x.items()} for x in (weights, gradients)]
            kept.append((copies[0], copies[1]))

    weight_gradients(model, structure, [tokens()], fold)
    ((weights, gradients),) = kept
    return weights, gradients


def loss_of(model: Any) -> float:
    batch = tokens()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(flat, batch["labels"][:, 1:].flatten()))


def slope(model: nn.Module, structure: Structure, layer: int, role: str, place: Any) -> float:
    """dL/dε of scaling some rows by 1 + ε, by central differences of fourth order.

    The step is large where RMS norms compute in float32 whatever the model's type is.
    """
    named = dict(model.named_parameters())
    probes = {name: torch.zeros_like(p).requires_grad_() for name, p in named.items()}
    marked = view(model, structure, layer, probes)[role][place].sum()
    marks = torch.autograd.grad(marked, list(probes.values()), allow_unused=True)
    before = {name: p.detach().clone() for name, p in named.items()}
    losses, step = [], 1e-4 if structure.family.norm == "layer" else 0.02
    for distance in (1, -1, 2, -2):
        with torch.no_grad():
            for (name, p), mark in zip(named.items(), marks, strict=True):
                if mark is not None:
                    p.copy_(before[name] * (1 + distance * step * mark))
        losses.append(loss_of(model))
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(before[name])
    return (8 * (losses[0] - losses[1]) - (losses[2] - losses[3])) / (12 * step)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("pair", [("query", "key"), ("output", "value"), ("down", "up")])
def test_first_order_terms_are_slopes_of_the_loss(name: str, pair: tuple[str, str]) -> None:
    model = tiny_model(name, dtype=torch.float64)
    structure, layer, component = Structure.of(model), 1, 2
    with unshared(model, structure) as own:
        weights, gradients = collect(model, own, layer)
        head = () if pair[0] == "down" else (2,)
        one, two = (*head, *([0] if head else []), component), (*head, component)
        found = Products.of(
            weights[pair[0]][one],
            weights[pair[1]][two],
            gradients[pair[0]][one],
            gradients[pair[1]][two],
        )
        expected = [slope(model, own, layer, pair[0], one), slope(model, own, layer, pair[1], two)]
    for place in (0, 1):
        assert float(found.slopes[place].sum()) == pytest.approx(
            expected[place], rel=1e-3, abs=1e-7
        )
    assert float(found.first) == pytest.approx(sum(expected) / 2, rel=1e-3, abs=1e-7)


def sides(name: str, first: str, second: str, **changes: Any) -> tuple[Tensor, Tensor]:
    """x·a and y·b of each component."""
    model = tiny_model(name, dtype=torch.float64, **changes)
    with unshared(model, Structure.of(model)) as own:
        weights, gradients = collect(model, own, 1)
    one, two = ((weights[role] * gradients[role]).sum(-1) for role in (first, second))
    return one.view_as(two), two


@pytest.mark.parametrize(
    ("name", "first", "second", "changes"),
    [
        ("llama", "output", "value", {}),
        ("qwen3", "output", "value", {}),
        ("gpt2", "output", "value", {}),
        ("llama", "down", "up", {}),
        ("phi3", "down", "up", {}),
        ("gpt2", "query", "key", {}),  # no rotary embedding
        ("opt", "query", "key", {}),
        ("opt", "down", "up", {}),  # ReLU
    ],
)
def test_the_two_slopes_are_equal_where_c_is_all_that_counts(
    name: str, first: str, second: str, changes: dict[str, Any]
) -> None:
    one, two = sides(name, first, second, **changes)
    torch.testing.assert_close(one, two)
    assert one.abs().median() > 1e-6


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_with_rotary_embeddings_pairs_of_components_have_equal_slopes(name: str) -> None:
    one, two = sides(name, "query", "key")
    assert not torch.allclose(one, two, rtol=1e-3)
    half = one.shape[-1] // 2
    torch.testing.assert_close(one[:, :half] + one[:, half:], two[:, :half] + two[:, half:])


def test_gelu_and_the_gate_leave_the_two_slopes_apart() -> None:
    for name, role in (("gpt2", "up"), ("llama", "gate")):
        one, two = sides(name, "down", role)
        assert not torch.allclose(one, two, rtol=1e-2)
