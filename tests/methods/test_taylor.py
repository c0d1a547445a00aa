from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.gradients.folded import weight_gradients
from lit_prune.methods.taylor import taylor_scores
from lit_prune.scores.taylor import ESTIMATES, Estimate
from lit_prune.structure import Structure
from lit_prune.structure.coupling import names_of, view
from tests.literal_taylor import Literal, loss_of, make_batches
from tests.structure.tiny import tiny_model

AXES = ("group", "query", "channel")


@pytest.fixture(scope="module", params=[False, True], ids=["full", "padded"])
def case(request: pytest.FixtureRequest) -> tuple[Any, list[dict[str, Tensor]], Literal]:
    model = tiny_model("llama", dtype=torch.float64)
    batches = make_batches(3, padded=request.param)
    return model, batches, Literal(model, batches)


@pytest.mark.parametrize(
    ("weighting", "fisher"), [("uniform", "mean"), ("loss", "mean"), ("uniform", "tokens")]
)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_scores_are_the_literal_ones(
    case: Any, estimate: Estimate, weighting: Any, fisher: Any
) -> None:
    model, batches, literal = case
    found = taylor_scores(
        model,
        Structure.of(model),
        batches,
        [estimate],
        AXES,
        weighting=weighting,
        fisher_scale=fisher,
    )[estimate]
    assert found.keys() == set(AXES)
    for axis in AXES:
        assert len(found[axis]) == 3
        for layer in range(3):
            expected = literal.scores(axis, layer, estimate, weighting, fisher)
            assert torch.allclose(found[axis][layer], torch.tensor(expected), rtol=1e-4), axis


def test_without_labels_what_is_not_padded_is_predicted() -> None:
    model: Any = tiny_model("llama", dtype=torch.float64)
    given, without = make_batches(2, padded=True), make_batches(2, padded=True)
    for batch, other in zip(given, without, strict=True):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        del other["labels"]
    expected, found = (
        taylor_scores(
            model, Structure.of(model), data, ["mixed"], ["channel"], fisher_scale="tokens"
        )["mixed"]["channel"]
        for data in (given, without)
    )
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_options_matter(case: Any) -> None:
    model, batches, _ = case
    structure = Structure.of(model)

    def scores(**options: Any) -> Tensor:
        found = taylor_scores(model, structure, batches, ["coarse"], ["channel"], **options)
        return torch.stack(found["coarse"]["channel"])

    plain = scores()
    for options in ({"weighting": "loss"}, {"fisher_scale": "tokens"}, {"reduction": "max"}):
        assert not torch.allclose(plain, scores(**options), rtol=1e-3)


def test_several_estimates_at_once_are_each_alone(case: Any) -> None:
    model, batches, _ = case
    structure = Structure.of(model)
    together = taylor_scores(model, structure, batches, ESTIMATES, AXES)
    for estimate in ESTIMATES:
        alone = taylor_scores(model, structure, batches, [estimate], AXES)[estimate]
        for axis in AXES:
            for a, b in zip(together[estimate][axis], alone[axis], strict=True):
                assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "step", "near"),
    [
        ("gpt2", 1e-4, 1e-9),
        ("opt", 1e-4, 1e-9),
        # norms or softmax in float32, whatever the model's dtype
        ("llama", 1e-2, 3e-5),
        ("qwen3", 1e-2, 3e-5),
        ("bloom", 1e-2, 3e-5),
        ("phi3", 1e-2, 3e-5),
    ],
)
def test_first_order_terms_are_slopes_of_the_loss(name: str, step: float, near: float) -> None:
    """Scaling what a unit owns of one role by 1 - h changes the loss by -h times its term."""
    model = tiny_model(name, dtype=torch.float64)
    structure, batch, layer = Structure.of(model), make_batches(1)[0], 1
    terms: dict[str, Tensor] = {}

    def fold(number: int, loss: float, at: int, weights: Any, gradients: Any) -> None:
        if at == layer:
            for role, g in gradients.items():
                terms[role] = (g * weights[role]).sum(-1)

    weight_gradients(model, structure, [batch], fold)
    names = names_of(model, structure, layer)
    dense = {n: model.get_parameter(n).detach().clone() for n in names}
    for role, term in terms.items():
        losses = []
        for h in (step, -step):
            with torch.no_grad():
                for n in names:
                    model.get_parameter(n).copy_(dense[n])
                scale_role(model, structure, layer, names, role, 1 - h)
                losses.append(float(loss_of(model, batch)))
        with torch.no_grad():
            for n in names:
                model.get_parameter(n).copy_(dense[n])
        expected = (losses[1] - losses[0]) / (2 * step)
        assert float(term[1].sum()) == pytest.approx(expected, rel=1e-3, abs=near), role
    assert max(float(term[1].sum().abs()) for term in terms.values()) > 100 * near


def scale_role(
    model: Any, structure: Structure, layer: int, names: list[str], role: str, by: float
) -> None:
    """Multiply what unit 1 owns of a role; numbers in the weights' places tell what that is."""
    numbers, first = {}, 1
    for name in names:
        parameter = model.get_parameter(name)
        numbers[name] = torch.arange(first, first + parameter.numel()).view(parameter.shape)
        first += parameter.numel()
    owned = view(model, structure, layer, numbers)[role][1].flatten()
    for name in names:
        parameter = model.get_parameter(name)
        parameter[torch.isin(numbers[name], owned)] *= by


def planted(seed: int) -> tuple[Any, dict[str, list[set[int]]]]:
    """A model in which some heads and channels hardly write, each to another degree."""
    model: Any = tiny_model("llama", seed=seed, num_key_value_heads=6)
    generator = torch.Generator().manual_seed(seed)
    weak: dict[str, list[set[int]]] = {"group": [], "channel": []}
    with torch.no_grad():
        for layer in model.model.layers:
            for axis, module, units, count in (
                ("group", layer.self_attn.o_proj, 6, 2),
                ("channel", layer.mlp.down_proj, 20, 5),
            ):
                chosen = torch.randperm(units, generator=generator)[:count].tolist()
                columns = module.weight.view(module.weight.shape[0], units, -1)
                for place, unit in enumerate(chosen):
                    columns[:, unit] *= 0.0004 * (place + 1)
                weak[axis].append(set(chosen))
    return model, weak


def lowest(scores: Tensor, count: int) -> set[int]:
    return set(scores.argsort()[:count].tolist())


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_planted_units_go_first(estimate: Estimate) -> None:
    for seed in range(4):
        model, weak = planted(seed)
        structure, batches = Structure.of(model), make_batches(4, seed=seed)
        found = taylor_scores(model, structure, batches, [estimate], list(weak))[estimate]
        for axis, layers in weak.items():
            for layer, units in enumerate(layers):
                assert lowest(found[axis][layer], len(units)) == units


def test_random_scores_miss_the_planted_units() -> None:
    for seed in range(4):
        _, weak = planted(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        hits = [lowest(torch.rand(20, generator=generator), 5) == x for x in weak["channel"]]
        assert not any(hits)


def test_scores_are_the_same_again(case: Any) -> None:
    model, batches, _ = case
    structure = Structure.of(model)
    a, b = (taylor_scores(model, structure, batches, ESTIMATES, AXES) for _ in range(2))
    for estimate in ESTIMATES:
        for axis in AXES:
            assert all(map(torch.equal, a[estimate][axis], b[estimate][axis]))
