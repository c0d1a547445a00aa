from __future__ import annotations

from typing import Any

import pytest

from lit_prune import PrunableLM
from lit_prune.allocation.ranking import kept_units, ranked
from lit_prune.callbacks.fisher import FisherPruning
from lit_prune.methods.fisher import fisher_scores
from lit_prune.structure import Structure
from lit_prune.structure.counting import unique_labels
from tests.fasp_ranks import Windows, trainer_of
from tests.planted import planted, removed_units, share
from tests.structure.tiny import tiny_model

BOTH: Any = ("group", "channel")
SMALL: dict[str, Any] = {"samples": 6, "length": 24, "batch_size": 2}

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def fitted(model: Any, **options: Any) -> PrunableLM:
    module = PrunableLM.from_model(model)
    trainer_of(FisherPruning(**{**SMALL, **options})).fit(module, datamodule=Windows())
    return module


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_units_go_first(seed: int, allocation: Any) -> None:
    case = planted(seed)
    module = fitted(case.model, axes=BOTH, sparsity=share(case.model), allocation=allocation)
    for axis in BOTH:
        assert removed_units(module.layout, axis) == [sorted(x) for x in case.weak[axis]]


def test_a_fit_prunes_what_the_functions_say() -> None:
    model = tiny_model("llama")
    structure, axes = Structure.of(model), ("query", "channel")
    batches = Windows().calibration_batches(6, 24, 2)
    scores = fisher_scores(model, structure, batches, axes)
    labels, widths = unique_labels(model, structure), structure.widths
    plan = ranked(scores, labels, widths, 0.2, axes, per_parameter=True)
    layout = kept_units(plan, scores, structure.widths)
    module = fitted(tiny_model("llama"), axes=axes)
    assert module.layout.to_dict() == layout.to_dict()


def test_its_defaults_are_those_it_was_tried_with() -> None:
    options = FisherPruning().options()
    assert options["axes"] == ["channel"]
    assert options["allocation"] == "global"
    assert options["restoration"] == "least_squares"
