"""Smoothing as an option of any method whose score comes batch by batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.allocation.ranking import Scores, kept_units, ranked
from lit_prune.calibration.calibration import Calibration
from lit_prune.callbacks import (
    CoupledComponentPruning,
    FASPPruning,
    FisherPruning,
    FLAPPruning,
    MagnitudePruning,
    RandomPruning,
    TaylorPruning,
    VIBPruning,
    WandaPruning,
    ZerothOrderPruning,
)
from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.methods.smoothing import Smoothing, batch_by_batch
from lit_prune.structure import Structure
from lit_prune.structure.counting import unique_labels
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
AXES: Any = ("query", "channel")
SMALL: dict[str, Any] = {"axes": AXES, "samples": 10, "length": 16, "batch_size": 2}
METHODS: dict[str, Any] = {
    "taylor": lambda **o: TaylorPruning(allocation="global", **o),
    "fisher": FisherPruning,
    "wanda": lambda **o: WandaPruning(allocation="global", **o),
}


def batches() -> list[Any]:
    return Windows().calibration_batches(10, 16, 2)


def calibration_of(data: list[Any], **options: Any) -> Calibration:
    model = tiny_model("llama")
    return Calibration(model, Structure.of(model), data, AXES, **options)


def by_hand(method: Any, data: list[Any]) -> Scores:
    smoothing = Smoothing()
    for batch in data:
        smoothing.update(method.score(calibration_of([batch])))
    return smoothing.result()


def assert_same(found: Scores, expected: Scores) -> None:
    assert found.keys() == expected.keys()
    for axis in expected:
        for one, other in zip(found[axis], expected[axis], strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_batches_are_scored_alone_and_joined(name: str) -> None:
    method = METHODS[name](**SMALL)
    expected = by_hand(method, batches())
    assert_same(batch_by_batch(calibration_of(batches()), method.score), expected)
    turned = batch_by_batch(calibration_of(batches()[::-1]), method.score)
    assert not torch.allclose(turned["channel"][0], expected["channel"][0], rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_prunes_by_them(name: str) -> None:
    data, layouts, options = Windows(), [], {**SMALL, "restoration": "none"}
    for smoothing in (True, False):
        module = PrunableLM.from_model(tiny_model("llama"))
        method = METHODS[name](sparsity=0.2, smoothing=smoothing, **options)
        trainer_of(method).fit(module, datamodule=data)
        layouts.append(module.layout.to_dict())
        found = module.history[0]["options"]
        assert found.get("smoothing", False) is smoothing
        model = tiny_model("llama")
        structure = Structure.of(model)
        whole = calibration_of(batches())
        scores = by_hand(method, batches()) if smoothing else method.score(whole)
        labels, widths = unique_labels(model, structure), structure.widths
        plan = ranked(scores, labels, widths, 0.2, AXES, per_parameter=True)
        assert layouts[-1] == kept_units(plan, scores, structure.widths).to_dict()
    assert layouts[0] != layouts[1]


def test_two_processes_join_as_one() -> None:
    """Two threads that meet whenever they gather; the second has a batch less."""
    gate, shared = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    method = METHODS["fisher"](**SMALL)
    own = [calibration_of(batches()[rank::2]) for rank in range(2)]  # seeds are not per thread

    def score(rank: int) -> Scores:
        def gather(tensor: Tensor) -> list[Tensor]:
            shared[rank] = tensor
            gate.wait()
            found = list(shared)
            gate.wait()
            return found

        own[rank].ranks = Ranks(reduce=lambda x: 7 * x, gather=gather)  # a batch is one process'
        return batch_by_batch(own[rank], method.score)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(score, range(2))
    expected = batch_by_batch(calibration_of(batches()), method.score)
    assert_same(first, expected)
    assert_same(second, expected)


def test_a_process_without_batches_takes_part() -> None:
    method, data = METHODS["fisher"](**SMALL), batches()[:1]
    expected = batch_by_batch(calibration_of(data), method.score)
    row = torch.cat(
        [x.flatten() for axis in AXES for x in method.score(calibration_of(data))[axis]]
    )
    sent = iter([[torch.tensor(1), torch.tensor(0)], [row[None], torch.zeros(1, len(row))]])
    ranks = Ranks(gather=lambda tensor: next(sent))
    assert_same(batch_by_batch(calibration_of([], ranks=ranks), method.score), expected)


def test_half_precision_by_default_is_none_of_its_business() -> None:
    method = METHODS["fisher"](**SMALL)
    expected = batch_by_batch(calibration_of(batches()), method.score)
    calibration = calibration_of(batches())
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = batch_by_batch(calibration, method.score)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["channel"][0].dtype == torch.float32
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (MagnitudePruning, {}, "score comes batch by batch for smoothing, got magnitude"),
        (RandomPruning, {}, "score comes batch by batch for smoothing, got random"),
        (ZerothOrderPruning, {"gradient_samples": 2}, "batch by batch for smoothing, got MINI-LLM"),
        (VIBPruning, {"axes": ["channel"], "multiple": 0, "steps": 1}, "for smoothing, got VIB"),
        (FASPPruning, {}, "before the cut for smoothing, got those of FASP with the uniform"),
        (FLAPPruning, {}, "scores of at least 0 for smoothing, .* got FLAP, whose"),
        (WandaPruning, {"allocation": "sensitivity"}, "those of Wanda-sp with the sensitivity"),
    ],
)
def test_what_it_is_not_for_is_refused(kind: Any, options: Any, text: str) -> None:
    data, module = Windows(), PrunableLM.from_model(tiny_model("llama"))
    callback = kind(smoothing=True, **{**SMALL, "axes": ["channel"], **options})
    trainer = trainer_of(callback, max_steps=1)
    with pytest.raises(UserError, match=text) as caught:
        trainer.fit(module, datamodule=data)
    assert "\n" not in str(caught.value)
    assert module.phase == "dense"
    assert (10, 16, 2) not in data.asked


def test_cce_has_its_own() -> None:
    for smoothing in (True, False):
        callback = CoupledComponentPruning(smoothing=smoothing)
        assert callback.options()["smoothing"] is smoothing
        assert callback.smoothing is False
