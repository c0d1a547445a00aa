"""Methods that need forward passes or none: random, magnitude, Wanda-sp and FLAP."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.allocation.ranking import kept_units, ranked
from lit_prune.calibration.calibration import Calibration
from lit_prune.callbacks.fasp import FASPPruning
from lit_prune.callbacks.flap import FLAPPruning
from lit_prune.callbacks.magnitude import MagnitudePruning
from lit_prune.callbacks.random_pruning import RandomPruning
from lit_prune.callbacks.wanda import WandaPruning
from lit_prune.pruning import PruningCallback
from lit_prune.scores.magnitude import magnitude
from lit_prune.scores.random import random_scores, seed_of
from lit_prune.structure import Structure
from lit_prune.structure.counting import unique_labels
from lit_prune.structure.coupling import per_unit, view
from tests.fasp_ranks import Windows, trainer_of
from tests.literal_fasp import columns, inputs_of
from tests.planted import planted, removed_units, share
from tests.structure.tiny import tiny_model

BOTH: Any = ("group", "channel")
SMALL: dict[str, Any] = {"samples": 6, "length": 24, "batch_size": 2}

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def fitted(callback: PruningCallback, model: Any) -> PrunableLM:
    module = PrunableLM.from_model(model)
    trainer_of(callback).fit(module, datamodule=Windows())
    return module


def removed(module: PrunableLM, axis: str) -> list[list[int]]:
    return removed_units(module.layout, axis)


METHODS = {
    "magnitude-l1": lambda **o: MagnitudePruning(norm="l1", **o),
    "magnitude-l2": lambda **o: MagnitudePruning(norm="l2", **o),
    "wanda": WandaPruning,
    "flap": lambda **o: FLAPPruning(**{"allocation": "uniform", **o}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", METHODS)
def test_planted_units_go_first(method: str, seed: int) -> None:
    for queries, axes in ((1, BOTH), (2, ("group",)), (1, ("channel",))):
        case = planted(seed, queries, axes)
        options = {**SMALL, "axes": axes, "sparsity": share(case.model, axes)}
        module = fitted(METHODS[method](**options), case.model)
        for axis in axes:
            assert removed(module, axis) == [sorted(units) for units in case.weak[axis]]


@pytest.mark.parametrize("method", METHODS)
def test_fewer_are_some_of_them(method: str) -> None:
    """How small a unit is also depends on its random weights, so any of them may be the first."""
    case = planted(0, axes=("channel",))
    options = {**SMALL, "axes": ("channel",), "sparsity": share(case.model, ("channel",)) / 3}
    module = fitted(METHODS[method](**options), case.model)
    for found, units in zip(removed(module, "channel"), case.weak["channel"], strict=True):
        assert len(found) == 2
        assert set(found) <= set(units)


@pytest.mark.parametrize("seed", range(3))
def test_random_pruning_misses_them(seed: int) -> None:
    case = planted(seed)
    options = {**SMALL, "axes": BOTH, "sparsity": share(case.model), "seed": seed}
    module = fitted(RandomPruning(**options), case.model)
    for axis in BOTH:
        found = removed(module, axis)
        assert [len(units) for units in found] == [len(units) for units in case.weak[axis]]
    assert removed(module, "channel") != [sorted(units) for units in case.weak["channel"]]


def test_a_seed_and_an_iteration_draw_other_units() -> None:
    once = [
        removed(fitted(RandomPruning(seed=seed, **SMALL), tiny_model("llama")), "channel")
        for seed in (0, 0, 1)
    ]
    assert once[0] == once[1] != once[2]
    model = tiny_model("llama")
    calibration = Calibration(model, Structure.of(model), [], ("channel",), seed=4, iteration=2)
    scores = RandomPruning().score(calibration)
    expected = random_scores(calibration.structure.widths, ["channel"], seed_of(4, 2))
    assert torch.equal(scores["channel"][1], expected["channel"][1])


@pytest.mark.parametrize("axes", [BOTH, ("query", "channel"), ("value", "channel")])
def test_magnitude_scores_every_layer(axes: tuple[str, ...]) -> None:
    model = tiny_model("phi3")
    structure = Structure.of(model)
    scores = MagnitudePruning(norm="l1").score(Calibration(model, structure, [], axes))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    for axis in axes:
        for layer, found in enumerate(scores[axis]):
            expected = magnitude(per_unit(view(model, structure, layer, weights), axis), "l1")
            assert torch.equal(found, expected)


def test_wanda_is_fasp_without_restoration() -> None:
    options = {**SMALL, "axes": BOTH, "sparsity": 0.3}
    wanda = fitted(WandaPruning(**options), tiny_model("llama"))
    fasp = fitted(FASPPruning(restoration="none", **options), tiny_model("llama"))
    assert wanda.layout.to_dict() == fasp.layout.to_dict()
    found, expected = (dict(module.model.named_parameters()) for module in (wanda, fasp))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert wanda.history[0]["method"] == "Wanda-sp"


def rows_of(model: Any, path: str) -> Tensor:
    """What a module reads of tokens that are no padding, [tokens, features]."""
    data = Windows().calibration_batches(6, 24, 2)
    kept = torch.cat([batch["attention_mask"].flatten() for batch in data]).bool()
    return inputs_of(model, path, data)[kept]  # padding on the right changes nothing before it


def literal_flap(model: Any, structure: Structure, axis: str, layer: int) -> list[float]:
    """Mean over a unit's columns of what is standardised over the layer's columns."""
    path = structure.readers(model, axis, layer)[0].path
    weight, x = columns(model, path), rows_of(model, path)
    own = []
    for j in range(weight.shape[1]):
        value = statistics.pvariance(x[:, j].tolist()) * float(weight[:, j].square().sum())
        own.append(value if axis == "channel" else value**2)
    mean, deviation = statistics.mean(own), statistics.stdev(own)
    standard = [(value - mean) / deviation for value in own]
    sizes = structure.widths.sizes(layer)
    size = {"channel": 1, "query": sizes["value"], "group": sizes["query"] * sizes["value"]}[axis]
    return [statistics.mean(standard[i : i + size]) for i in range(0, len(standard), size)]


def literal_bias(model: Any, structure: Structure, axis: str, layer: int, keep: Any) -> Tensor:
    """A reader's bias and the mean of what its removed columns put out in the dense model."""
    site = structure.readers(model, axis, layer)[0]
    weight, rows = columns(model, site.path), rows_of(model, site.path)
    old = getattr(model.get_submodule(site.path), "bias", None)
    bias = torch.zeros(weight.shape[0]) if old is None else old.detach().clone()
    assert site.line.reads is not None
    if axis in keep:
        stays = site.line.reads.mask(structure.widths.sizes(layer), {axis: keep[axis]})
        for j in (~stays).nonzero().flatten().tolist():
            bias += weight[:, j] * rows[:, j].mean()
    return bias


FLAP_CASES: list[tuple[str, Any, float]] = [
    ("llama", BOTH, 0.3),
    ("mistral", ("query", "channel"), 0.3),  # gets biases
    ("gpt2", BOTH, 0.25),
    ("falcon-7b", ("query",), 0.15),
]


@pytest.mark.parametrize(("name", "axes", "sparsity"), FLAP_CASES)
def test_flap_prunes_below_one_threshold_and_puts_means_into_biases(
    name: str, axes: Any, sparsity: float
) -> None:
    model = tiny_model(name)
    structure = Structure.of(model)
    scores = {
        axis: [torch.tensor(literal_flap(model, structure, axis, layer)) for layer in range(3)]
        for axis in axes
    }
    if "query" in axes:
        sizes = structure.widths.layers[0]
        scores["query"] = [x.view(sizes["group"], sizes["query"]) for x in scores["query"]]
    flap = FLAPPruning(axes=axes, sparsity=sparsity, **SMALL)
    batches = Windows().calibration_batches(6, 24, 2)
    found = flap.score(Calibration(model, structure, batches, axes))
    for axis in axes:
        for one, two in zip(found[axis], scores[axis], strict=True):
            assert torch.allclose(one, two, atol=1e-5)

    labels = unique_labels(model, structure)
    plan = ranked(found, labels, structure.widths, flap.sparsity, axes)
    layout = kept_units(plan, found, structure.widths)
    module = fitted(flap, tiny_model(name))
    assert module.layout.to_dict() == layout.to_dict()
    assert all(any(axis in unit.keep for unit in layout.layers) for axis in axes)
    for layer, unit in enumerate(layout.layers):
        for axis in axes:
            expected = literal_bias(model, structure, axis, layer, unit.keep)
            path = structure.readers(model, axis, layer)[0].path
            bias = getattr(module.model.get_submodule(path), "bias", None)
            bias = torch.zeros_like(expected) if bias is None else bias
            assert torch.allclose(bias, expected, atol=1e-4)


def test_flaps_defaults_are_the_papers() -> None:
    flap = FLAPPruning()
    options = flap.options()
    assert options["axes"] == ["group", "channel"]
    assert options["allocation"] == "global"
    assert options["restoration"] == "bias"
    assert MagnitudePruning(norm="l1").options()["norm"] == "l1"
    assert (
        RandomPruning().options()["restoration"]
        == WandaPruning().options()["restoration"]
        == "none"
    )
