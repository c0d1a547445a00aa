from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.calibration.calibration import Calibration
from lit_prune.callbacks.fusion import AdaptiveFusionPruning
from lit_prune.callbacks.taylor import TaylorPruning
from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.methods.taylor import taylor_scores
from lit_prune.structure import Structure
from lit_prune.structure.counting import count_actual
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
ESTIMATES: Any = ("vector", "element1", "element2", "mixed")


class Labelled(Windows):
    """Calibration windows with labels."""

    def calibration_batches(self, *args: Any, **options: Any) -> list[dict[str, Tensor]]:
        found = super().calibration_batches(*args, **options)
        return [
            {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
            for batch in found
        ]


def fitted(callback: Any, name: str = "llama", **options: Any) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model(name))
    trainer_of(callback).fit(module, datamodule=Labelled())
    return module


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_a_fit_removes_the_lowest_scores_of_each_layer(estimate: Any) -> None:
    options: Any = {"reduction": "max"}
    if estimate in ("element2", "mixed"):
        options["fisher_scale"] = "tokens"
    callback = TaylorPruning(0.4, estimate, samples=4, length=16, **options)
    module = fitted(callback)
    model = tiny_model("llama")
    structure, batches = Structure.of(model), Labelled().calibration_batches(4, 16, 1)
    scores = taylor_scores(model, structure, batches, [estimate], ["group", "channel"], **options)
    removed = {"group": 0, "channel": 0}
    for layer, unit in enumerate(module.layout.layers):
        for axis, kept in unit.keep.items():
            values = scores[estimate][axis][layer]
            assert kept.tolist() == sorted(values.argsort()[len(values) - len(kept) :].tolist())
            removed[axis] += len(values) - len(kept)
    assert min(removed.values()) > 0
    (step,) = module.history
    assert step["method"] == "Taylor"
    given = {"estimate": estimate, "reduction": "max"}
    assert given.items() <= step["options"].items()
    scale = {"vector": None, "element1": None}.get(estimate, "tokens")  # where it counts
    assert step["options"].get("fisher_scale") == scale
    assert step["sparsity"]["decoder"] == pytest.approx(0.4, abs=0.02)
    json.dumps(step)


def test_the_defaults_are_llm_pruners() -> None:
    callback = TaylorPruning()
    assert callback.options() == {
        "axes": ["group", "channel"],
        "allocation": "uniform",
        "restoration": "none",
        "calibration": "10 x 128 tokens",
        "batch_size": 1,
        "protected_layers": [],
        "estimate": "element1",
        "reduction": "sum",
    }
    assert callback.batch_size == 1


@pytest.mark.parametrize("axes", [["query", "channel"], ["value"], ["channel"]])
@pytest.mark.parametrize("restoration", ["none", "least_squares"])
def test_other_axes_and_restorations(axes: Any, restoration: Any) -> None:
    callback = TaylorPruning(
        0.1, "element2", axes=axes, samples=2, length=16, restoration=restoration
    )
    module = fitted(callback)
    before = tiny_model("llama")
    sizes = [
        count_actual(model, structure, decoder=True)
        for model, structure in (
            (module.model, module.structure),
            (before, Structure.of(before)),
        )
    ]
    assert sizes[0] == pytest.approx(0.9 * sizes[1], rel=0.02)
    assert all(p.isfinite().all() for p in module.model.parameters())


@pytest.mark.parametrize("callback", [TaylorPruning(), AdaptiveFusionPruning()])
def test_sums_are_over_all_processes(callback: Any) -> None:
    model = tiny_model("llama")
    calls: list[int] = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return tensor

    batches = Labelled().calibration_batches(2, 16, 1)
    structure, ranks = Structure.of(model), Ranks(reduce)
    callback.score(Calibration(model, structure, batches, ("channel",), ranks=ranks))
    estimates = 2 if isinstance(callback, AdaptiveFusionPruning) else 1
    assert len(calls) == 3 * (1 + 3 * estimates)  # weights, then each role, in each layer


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_weights_gradients_and_modes_stay(estimate: Any) -> None:
    model = tiny_model("llama").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = TaylorPruning(0.2, estimate, samples=2, length=16)
    batches = Labelled().calibration_batches(2, 16, 1)
    callback.score(Calibration(model, Structure.of(model), batches, callback.axes))
    assert model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
        assert p.requires_grad


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": ["hidden"]}, "axes out of channel, group, query, value for .*, got hidden"),
        (
            {"estimate": "coarse"},
            "estimate to be one of vector, element1, element2, mixed, got",
        ),
        ({"reduction": "mean"}, "reduction to be one of sum, max, got 'mean'"),
        ({"fisher_scale": "sum"}, "fisher_scale to be one of mean, tokens, got 'sum'"),
        ({"sparsity": 1.0}, "a sparsity from 0 to below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Any, text: str) -> None:
    with pytest.raises(UserError, match=f"expected {text}") as caught:
        TaylorPruning(**options)
    assert "\n" not in str(caught.value)
