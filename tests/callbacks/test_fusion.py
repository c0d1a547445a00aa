from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.calibration.calibration import Calibration
from lit_prune.callbacks.fusion import AdaptiveFusionPruning
from lit_prune.errors import UserError
from lit_prune.methods.taylor import taylor_scores
from lit_prune.scores.fusion import fuse
from lit_prune.structure import Structure
from tests.callbacks.test_taylor import Labelled
from tests.fasp_ranks import trainer_of
from tests.methods.test_taylor import lowest, planted
from tests.structure.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
OPTIONS: Any = {"samples": 4, "length": 16, "restoration": "none"}


def fitted(callback: Any, model: Any = None, **options: Any) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model("llama") if model is None else model, **options)
    trainer_of(callback).fit(module, datamodule=Labelled())
    return module


def assert_lowest_are_gone(module: PrunableLM, scores: dict[str, list[Tensor]]) -> None:
    removed = 0
    for unit in module.layout.layers:
        for axis, kept in unit.keep.items():
            values = scores[axis][unit.source]
            gone = lowest(values, len(values) - len(kept))
            assert set(kept.tolist()) == set(range(len(values))) - gone
            removed += len(gone)
    assert removed > 5


@pytest.mark.parametrize("mixing", ["sum", "normalised", "depth"])
@pytest.mark.parametrize("weighting", ["uniform", "loss"])
def test_a_fit_removes_the_lowest_fused_scores(mixing: Any, weighting: Any) -> None:
    callback = AdaptiveFusionPruning(0.4, mixing=mixing, weighting=weighting, **OPTIONS)
    module = fitted(callback)
    model = tiny_model("llama")
    found = taylor_scores(
        model,
        Structure.of(model),
        Labelled().calibration_batches(4, 16, 1),
        ["coarse", "mixed"],
        ["group", "channel"],
        weighting=weighting,
    )
    assert_lowest_are_gone(module, fuse(found["coarse"], found["mixed"], mixing))
    (step,) = module.history
    assert step["method"] == "adaptive fusion"
    given = {"estimate": "fusion", "mixing": mixing, "weighting": weighting}
    assert given.items() <= step["options"].items()
    json.dumps(step)


@pytest.mark.parametrize("weighting", ["uniform", "loss"])
@pytest.mark.parametrize("fisher_scale", ["mean", "tokens"])
def test_every_option_reaches_the_score(weighting: Any, fisher_scale: Any) -> None:
    own: Any = {"weighting": weighting, "fisher_scale": fisher_scale}
    model, batches = tiny_model("llama"), Labelled().calibration_batches(4, 16, 1)
    structure, axes = Structure.of(model), ("group", "channel")
    found = AdaptiveFusionPruning(**own).score(Calibration(model, structure, batches, axes))
    each = taylor_scores(model, structure, batches, ["coarse", "mixed"], axes, **own)
    expected = fuse(each["coarse"], each["mixed"])
    for axis in axes:
        assert all(map(torch.equal, found[axis], expected[axis]))


@pytest.mark.parametrize("estimate", ["vector", "element1", "element2", "mixed"])
def test_the_single_estimates_are_options(estimate: Any) -> None:
    scale: Any = {} if estimate in ("vector", "element1") else {"fisher_scale": "tokens"}
    module = fitted(AdaptiveFusionPruning(0.4, estimate, **scale, **OPTIONS))
    model = tiny_model("llama")
    batches = Labelled().calibration_batches(4, 16, 1)
    axes = ["group", "channel"]
    found = taylor_scores(model, Structure.of(model), batches, [estimate], axes, **scale)
    assert_lowest_are_gone(module, found[estimate])
    assert module.history[0]["options"]["estimate"] == estimate
    assert "mixing" not in module.history[0]["options"]


def test_planted_units_go_first() -> None:
    for seed in range(3):
        model, weak = planted(seed)
        callback = AdaptiveFusionPruning(0.26, **OPTIONS)
        module = fitted(callback, model)
        for unit in module.layout.layers:
            for axis, kept in unit.keep.items():
                planted_units = weak[axis][unit.source]
                gone = set(range(6 if axis == "group" else 20)) - set(kept.tolist())
                assert gone <= planted_units or planted_units <= gone
                assert gone


@pytest.mark.parametrize(
    ("protected", "layers", "expected"),
    [(None, 8, [0, 7]), (None, 16, [0, 1, 15]), (None, 3, []), ([2], 8, [2]), ([], 8, [])],
)
def test_the_ends_are_protected_unless_said_otherwise(
    protected: Any, layers: int, expected: list[int]
) -> None:
    callback = AdaptiveFusionPruning(0.2, "vector", protected_layers=protected, **OPTIONS)
    module = fitted(callback, tiny_model("llama", num_hidden_layers=layers))
    whole = [
        unit.source
        for unit, sizes in zip(module.layout.layers, module.structure.widths.layers, strict=True)
        if sizes == {"channel": 20, "group": 2, "query": 3, "value": 8}
    ]
    assert whole == expected
    assert module.history[0]["options"]["protected_layers"] == expected


def test_under_stock_no_layer_is_protected_by_itself() -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    module = fitted(AdaptiveFusionPruning(0.2, "vector", **OPTIONS), model, stock=True)
    assert len({sizes["channel"] for sizes in module.structure.widths.layers}) == 1
    assert module.history[0]["options"]["protected_layers"] == []


def test_the_papers_ratio_is_that_of_each_pruned_layer() -> None:
    callback = AdaptiveFusionPruning(per_layer_ratio=0.2, axes=["channel"], **OPTIONS)
    module = fitted(callback, tiny_model("llama", num_hidden_layers=8))
    reached = module.history[0]["sparsity"]["decoder"]
    assert reached == pytest.approx(0.2 * 6 / 8, abs=0.01)


def test_the_defaults_are_the_papers() -> None:
    callback = AdaptiveFusionPruning()
    assert callback.options() == {
        "axes": ["group", "channel"],
        "allocation": "uniform",
        "restoration": "unit_scales",
        "calibration": "50 x 128 tokens",
        "batch_size": 1,
        "protected_layers": [],
        "estimate": "fusion",
        "mixing": "sum",
        "weighting": "uniform",
        "fisher_scale": "mean",
    }
    assert callback.batch_size == 1


def test_unit_scales_change_no_more_than_the_scale_of_units() -> None:
    options: Any = {**OPTIONS, "restoration": "unit_scales"}
    module, dense = fitted(AdaptiveFusionPruning(0.3, **options)), tiny_model("llama").state_dict()
    changed = 0
    for unit in module.layout.layers:
        kept = unit.keep["channel"]
        path = f"model.layers.{unit.source}.mlp.down_proj.weight"
        found, before = module.model.get_parameter(path), dense[path][:, kept]
        scales = (found * before).sum(0) / before.square().sum(0)
        assert torch.allclose(found, before * scales, atol=1e-5)
        assert scales.abs().max() <= 10
        changed += int((scales - 1).abs().max() > 1e-3)
    assert changed == 3


def test_one_seed_gives_one_result() -> None:
    first, second = (fitted(AdaptiveFusionPruning(0.3, **OPTIONS)) for _ in range(2))
    assert first.layout.to_dict() == second.layout.to_dict()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": ["channel", "hidden"]}, "axes out of channel, group, query, value for"),
        ({"estimate": "coarse"}, "estimate to be one of fusion, vector, element1, element2, mixed"),
        ({"mixing": "mean"}, "mixing to be one of sum, normalised, depth"),
        ({"weighting": "length"}, "weighting to be one of uniform, loss"),
        ({"fisher_scale": "sum"}, "fisher_scale to be one of mean, tokens"),
        ({"mixing": "depth", "allocation": "global"}, "mixing sum with the global allocation"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Any, text: str) -> None:
    with pytest.raises(UserError, match=f"expected {text}") as caught:
        AdaptiveFusionPruning(**{"restoration": "none", **options})
    assert "\n" not in str(caught.value)
