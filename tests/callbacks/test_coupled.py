from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.callbacks.coupled import CoupledComponentPruning
from lit_prune.errors import UserError
from lit_prune.gradients.lora import LoRA
from lit_prune.methods.coupled import coupled_scores
from lit_prune.methods.elimination import plan_course
from lit_prune.methods.smoothing import Smoothing
from lit_prune.scores.random import seed_of
from lit_prune.structure import LayerUnits, Layout, Structure, cut
from lit_prune.structure.counting import count_actual, unique_labels
from lit_prune.structure.norms import energies
from tests.fasp_ranks import Windows, trainer_of
from tests.planted_components import plant
from tests.structure.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
ALL: Any = ("query", "channel", "hidden")
SMALL: dict[str, Any] = {"samples": 4, "length": 16}


def fitted(
    callback: CoupledComponentPruning, name: str = "llama", model: Any = None, **options: Any
) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model(name) if model is None else model, **options)
    trainer_of(callback).fit(module, datamodule=Windows())
    return module


def lowest(scores: Tensor, number: int) -> set[int]:
    return set(scores.argsort()[:number].tolist())


def literal(
    name: str, axes: tuple[str, ...], gradients: str, norm_rescale: Any, smooth: bool
) -> tuple[Any, Layout]:
    """The iterations one after the other, with the public functions."""
    model = tiny_model(name)
    structure, total = Structure.of(model), Layout.full(Structure.of(model).widths)
    course = plan_course(unique_labels(model, structure), structure.widths, axes, sparsity=0.45)
    for turn, step in enumerate(course.steps):
        batches = Windows().calibration_batches(4, 16, 1, turn=turn)
        lora = LoRA(seed=seed_of(3, turn)) if gradients == "lora" else None
        scores = coupled_scores(model, structure, batches, axes, Smoothing(smooth), lora=lora)
        units = []
        for layer, sizes in enumerate(structure.widths.layers):
            keep = {}
            for axis, removed in step.removed.items():
                table, gone = scores[axis][layer], removed[layer]
                rows = table if table.dim() == 2 else table[None]
                stay = [sorted(set(range(sizes[axis])) - lowest(row, gone)) for row in rows]
                if gone:
                    keep[axis] = torch.tensor(stay if table.dim() == 2 else stay[0])
            units.append(LayerUnits(layer, keep))
        width = structure.widths.shared["hidden"]
        gone = lowest(scores["hidden"][0], step.features) if step.features else set()
        hidden = torch.tensor(sorted(set(range(width)) - gone)) if gone else None
        layout = Layout(structure.widths.copy(), hidden, tuple(units))
        with torch.no_grad():
            cut(model, structure, layout, norm_rescale, energies(model, structure, batches))
        total = total.then(layout)
    return model, total


@pytest.mark.parametrize(
    ("name", "axes", "gradients", "norm_rescale", "smooth"),
    [
        ("llama", ALL, "full", "calibrated", True),
        ("llama", ALL, "full", "masked", False),
        ("llama", ("query", "hidden"), "lora", "none", True),
        ("llama", ("group", "channel"), "full", "calibrated", True),
        ("gpt2", ("group", "channel", "hidden"), "full", "calibrated", True),
        ("falcon-new", ALL, "full", "calibrated", True),
    ],
)
def test_a_fit_prunes_as_the_functions_do(
    name: str, axes: Any, gradients: Any, norm_rescale: Any, smooth: bool
) -> None:
    callback = CoupledComponentPruning(
        0.45,
        axes,
        gradients=gradients,
        norm_rescale=norm_rescale,
        smoothing=smooth,
        seed=3,
        **SMALL,
    )
    module = fitted(callback, name)
    model, layout = literal(name, axes, gradients, norm_rescale, smooth)
    assert module.layout.to_dict() == layout.to_dict()
    expected = dict(model.named_parameters())
    found = dict(module.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    "axes", [("query", "channel", "hidden"), ("channel",), ("group", "channel")]
)
@pytest.mark.parametrize("sparsity", [0.1, 0.25])
def test_the_target_is_met_by_iterations(axes: Any, sparsity: float) -> None:
    data, module = Windows(), PrunableLM.from_model(tiny_model("llama"))
    callback = CoupledComponentPruning(sparsity, axes, **SMALL)
    trainer_of(callback).fit(module, datamodule=data)
    dense = tiny_model("llama")
    before = count_actual(dense, Structure.of(dense), decoder=True)
    after = count_actual(module.model, module.structure, decoder=True)
    assert abs(1 - after / before - sparsity) * before <= 3 * 38  # a channel and its biases
    (step,) = module.history
    assert step["method"] == "CCE"
    assert step["sparsity"]["target"] == sparsity
    assert step["sparsity"]["decoder"] == pytest.approx(1 - after / before)
    assert data.asked.count((4, 16, 1)) == callback.iteration == callback.iterations
    if axes == ("channel",):  # three channels go from each layer at a time
        assert callback.iterations > 1
        assert step["options"]["iterations"] == callback.iterations
    assert ("norm_rescale" in step["options"]) == ("hidden" in axes)
    json.dumps(step)


def test_a_number_of_iterations_takes_full_ones() -> None:
    callback = CoupledComponentPruning(iterations=3, ffn_step=2, **SMALL)
    module = fitted(callback)
    widths = module.structure.widths
    assert widths.uniform("channel") == 20 - 3 * 2
    assert widths.shared["hidden"] == 36 - 3 * 8
    assert widths.uniform("query") == 2  # two heads go together, in the second iteration
    (step,) = module.history
    assert step["sparsity"]["decoder"] == pytest.approx(step["sparsity"]["target"])
    assert step["options"]["ffn_step"] == 2


def test_where_no_heads_share_keys_a_head_is_a_group() -> None:
    module = fitted(CoupledComponentPruning(iterations=1, **SMALL), "gpt2")
    widths = module.structure.widths
    assert (widths.uniform("group"), widths.shared["hidden"], widths.uniform("channel")) == (
        3,
        32 - 8,
        15,
    )
    (step,) = module.history
    assert step["options"]["axes"] == ["group", "channel", "hidden"]


def test_the_defaults_are_the_papers() -> None:
    callback = CoupledComponentPruning()
    expected = {"gradients": "full", "smoothing": True, "norm_rescale": "calibrated"}
    assert expected.items() <= callback.options().items()
    assert callback.options()["calibration"] == "10 x 64 tokens"
    assert callback.batch_size == 1
    assert callback.axes == ("query", "channel", "hidden")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("axes", [ALL, ("channel",)])
def test_planted_units_go_first(seed: int, axes: Any) -> None:
    def removed(
        iterations: int, criterion: Any = "components"
    ) -> tuple[Any, list[list[int]], list[set[int]], set[int]]:
        planted = plant(seed)
        layout = fitted(
            CoupledComponentPruning(
                axes=axes,
                iterations=iterations,
                ffn_step=2,
                criterion=criterion,
                seed=seed,
                **SMALL,
            ),
            model=planted.model,
        ).layout
        channels = [set(range(24)) - set(unit.keep["channel"].tolist()) for unit in layout.layers]
        features = set(range(36)) - set([] if layout.hidden is None else layout.hidden.tolist())
        heads = [
            [3 - sum(row) for row in unit.keep["query"].tolist()] if "query" in unit.keep else []
            for unit in layout.layers
        ]
        return planted, heads, channels, features

    planted, _, channels, features = removed(1)
    assert all(found < weak for found, weak in zip(channels, planted.channels, strict=True))
    if "hidden" in axes:
        assert features < planted.features
    _, heads, channels, _ = removed(3)
    assert channels == planted.channels
    if "query" in axes:
        assert heads == planted.heads
    assert removed(3, "random")[2] != planted.channels
    assert removed(3, "l2")[2] == planted.channels  # their weights are small, too


def test_restoration_is_left_to_the_user() -> None:
    plain = fitted(CoupledComponentPruning(0.2, ("channel",), **SMALL))
    restored = fitted(
        CoupledComponentPruning(0.2, ("channel",), restoration="least_squares", **SMALL)
    )
    dense = tiny_model("llama").state_dict()
    name = "model.layers.2.mlp.down_proj.weight"
    kept = plain.layout.layers[2].keep["channel"]
    assert torch.equal(plain.model.get_parameter(name), dense[name][:, kept])
    kept = restored.layout.layers[2].keep["channel"]
    assert not torch.allclose(restored.model.get_parameter(name), dense[name][:, kept], atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"allocation": "global"},
        {"allocation": "sensitivity", "samples": 8},
        {"multiple": 4},
        {"per_layer_ratio": 0.2, "protected_layers": [0]},
    ],
)
def test_other_allocations_take_the_same_share_each_time(options: Any) -> None:
    options = {**SMALL, "iterations": 2, **options}
    callback = CoupledComponentPruning(0.2, ("group", "channel"), **options)
    module = fitted(callback)
    assert callback.iteration == 2
    (step,) = module.history
    assert step["sparsity"]["decoder"] == pytest.approx(0.2, abs=0.08)
    assert CoupledComponentPruning(axes=("channel",), multiple=4).iterations == 3


@pytest.mark.parametrize("how", [{"sparsity": 0.4}, {"iterations": 2}])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_the_target_of_all_parameters_counts_what_embeddings_lose(name: str, how: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "expected to remove")
        module = fitted(CoupledComponentPruning(relative_to="total", **how, **SMALL), name)
    (step,) = module.history
    found = step["sparsity"]
    assert found["target"] == pytest.approx(found["decoder"])
    assert found["total"] == pytest.approx(step["options"]["sparsity"], abs=0.02)
    assert found["total"] != pytest.approx(found["decoder"], abs=0.01)


def test_heads_that_are_groups_are_named_once() -> None:
    axes: Any = ("group", "query", "channel")
    module = fitted(CoupledComponentPruning(0.2, axes, **SMALL), "gpt2")
    assert module.history[0]["options"]["axes"] == ["group", "channel"]


def test_protected_layers_lose_features_only() -> None:
    module = fitted(CoupledComponentPruning(0.3, protected_layers=[1], **SMALL))
    layers = module.structure.widths.layers
    assert layers[1] == {"channel": 20, "group": 2, "query": 3, "value": 8}
    assert layers[0]["channel"] < 20
    assert module.structure.widths.shared["hidden"] < 36


def test_stock_layers_have_the_same_widths() -> None:
    module = fitted(CoupledComponentPruning(0.4, ("query", "channel"), **SMALL), stock=True)
    assert module.is_stock
    assert module.structure.widths.uniform("channel") == module.model.config.intermediate_size


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradients": "zeroth"}, "gradients to be one of full, lora, got 'zeroth'"),
        ({"norm_rescale": "all"}, "norm_rescale to be one of masked, none, calibrated, got 'all'"),
        ({"allocation": "global"}, "no other allocation than uniform.*where hidden is cut, got gl"),
        ({"multiple": 8}, "where hidden is cut, got uniform, None and 8"),
        ({"sparsity": 1.0}, "a sparsity from 0 to below 1"),
        ({"iterations": 0}, "iterations of at least 1"),
        ({"axes": ("value",)}, "axes out of channel, group, query, hidden for CCE, got value"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Any, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        CoupledComponentPruning(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": ("group", "query")}, "expected axes out of group, query, channel, hidden"),
        ({"axes": ("channel",), "sparsity": 0.5}, "can reach, got 0.5"),
        ({"ffn_step": 0}, "ffn_step of at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(options: Any, text: str) -> None:
    data, module = Windows(), PrunableLM.from_model(tiny_model("llama"))
    with pytest.raises(UserError, match=text):
        trainer_of(CoupledComponentPruning(**{**SMALL, **options})).fit(module, datamodule=data)
    assert (4, 16, 1) not in data.asked
    assert module.phase == "dense"
