from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prune import PrunableLM
from lit_prune.calibration.calibration import Calibration
from lit_prune.callbacks.zeroth import ZerothOrderPruning
from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.gradients.spsa import GateNoise, WeightNoise, loss_slopes, windows
from lit_prune.methods.zeroth_order import (
    backprop_scores,
    feature_map_scores,
    gate_scores,
    input_statistics,
    scored_parts,
)
from lit_prune.scores.random import seed_of
from lit_prune.structure import Structure
from lit_prune.structure.coupling import parameter_names
from tests.crowded import crowded
from tests.fasp_ranks import Windows, trainer_of
from tests.planted import planted, removed_units, share
from tests.structure.tiny import tiny_model
from tests.zeroth_ranks import layouts

BOTH: Any = ("group", "channel")
SMALL: dict[str, Any] = {"samples": 6, "length": 24, "batch_size": 2, "gradient_samples": 5}
CRITERIA = ["fms", "wanda", "magnitude", "gradient"]

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def small(criterion: str) -> dict[str, Any]:
    """Only what counts with a criterion."""
    names = set(SMALL) if criterion in ("fms", "gradient") else set(SMALL) - {"gradient_samples"}
    return {name: SMALL[name] for name in names}


def fitted(model: Any, **options: Any) -> PrunableLM:
    module = PrunableLM.from_model(model)
    given = {**small(options.get("criterion", "fms")), **options}
    trainer_of(ZerothOrderPruning(**given)).fit(module, datamodule=Windows())
    return module


def calibration_of(model: Any, axes: Any = BOTH, **options: Any) -> Calibration:
    batches = Windows().calibration_batches(6, 24, 2)
    return Calibration(model, Structure.of(model), batches, axes, **options)


@pytest.mark.parametrize(
    "options", [*({"criterion": name} for name in CRITERIA), {"gradient": "backprop"}]
)
@pytest.mark.parametrize("seed", range(3))
def test_planted_units_go_first(seed: int, options: dict[str, Any]) -> None:
    for queries, axes in ((1, BOTH), (2, ("group",))):
        case = planted(seed, queries, axes)
        module = fitted(case.model, axes=axes, sparsity=share(case.model, axes), **options)
        for axis in axes:
            found = removed_units(module.layout, axis)
            assert found == [sorted(units) for units in case.weak[axis]]


KINDS = [("gates", "fms"), *(("weights", name) for name in CRITERIA)]
KINDS += [("backprop", "fms"), ("backprop", "gradient")]


@pytest.mark.parametrize(("kind", "criterion"), KINDS)
def test_scores_are_those_of_the_functions(kind: str, criterion: Any) -> None:
    options: dict[str, Any] = {"criterion": criterion, **small(criterion)}
    options |= {"gradient": kind} if kind == "backprop" else {"perturb": kind}
    calibration = calibration_of(tiny_model("llama"), seed=3, iteration=2)
    found = ZerothOrderPruning(**options).score(calibration)

    model = tiny_model("llama")
    structure = Structure.of(model)
    layers = scored_parts(model, structure, BOTH)
    paths = [part.path for layer in layers for part in layer]
    statistics = input_statistics(model, calibration.batches, paths)
    own = windows(calibration.batches, 5, 2)
    if kind == "gates":
        gates = GateNoise(model, structure, BOTH, seed_of(3, 2))
        slopes = loss_slopes(model, own, gates, 5, 1e-2)
        expected = gate_scores(model, structure, BOTH, statistics, gates, slopes)
    elif kind == "backprop":
        ids = torch.cat([batch["input_ids"] for batch in calibration.batches])[:5]
        mask = torch.cat([batch["attention_mask"] for batch in calibration.batches])[:5]
        labels = ids.masked_fill(mask == 0, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        expected = backprop_scores(model, structure, BOTH, statistics, [batch], criterion)
    else:
        names = parameter_names(model, [part for layer in layers for part in layer])
        noise = WeightNoise(model, names, seed_of(3, 2))
        slopes = loss_slopes(model, own, noise, 5, 1e-3)
        expected = feature_map_scores(
            model, structure, BOTH, statistics, lambda x: noise.gradient(x, slopes), criterion
        )
    for axis in BOTH:
        for one, two in zip(found[axis], expected[axis], strict=True):
            assert torch.allclose(one, two, rtol=1e-4)


def test_a_backward_pass_takes_no_more_windows_than_memory_holds() -> None:
    options: dict[str, Any] = {**SMALL, "gradient": "backprop", "sparsity": 0.4}
    whole = fitted(tiny_model("llama"), **options)
    model, seen = tiny_model("llama"), []
    layer = model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with crowded(model, 1, layer=0) as failures, pytest.warns(UserWarning, match="memory ran out"):
        found = fitted(model, **options)
    assert failures
    assert max(seen) == 2  # of 5 windows for the gradient
    assert found.layout.to_dict() == whole.layout.to_dict()


@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
@pytest.mark.parametrize("gradient", ["zeroth_order", "backprop"])
def test_norms_are_taken_where_they_count(
    criterion: Any, gradient: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (criterion, gradient) == ("magnitude", "backprop"):
        return  # refused
    expected = ZerothOrderPruning(criterion=criterion, gradient=gradient, **small(criterion))
    scores = expected.score(calibration_of(tiny_model("llama")))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("lit_prune.callbacks.zeroth.input_statistics", refuse)
    callback = ZerothOrderPruning(criterion=criterion, gradient=gradient, **small(criterion))
    calibration = calibration_of(tiny_model("llama"))
    if criterion == "magnitude":
        calibration.batches = []
    assert callback.needs_data == (criterion == "gradient")
    found = callback.score(calibration)
    for axis in BOTH:
        assert all(map(torch.equal, found[axis], scores[axis]))
    with pytest.raises(AssertionError):
        ZerothOrderPruning(**SMALL).score(calibration_of(tiny_model("llama")))


def test_one_seed_has_one_result() -> None:
    once = [fitted(tiny_model("llama"), seed=seed, sparsity=0.4).layout for seed in (0, 0, 1)]
    assert once[0].to_dict() == once[1].to_dict()
    assert once[0].to_dict() != once[2].to_dict()


@pytest.mark.parametrize("perturb", ["weights", "gates"])
def test_no_graph_is_built_from_the_first_to_the_last(perturb: Any) -> None:
    model = tiny_model("llama").requires_grad_(True)
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(torch.is_grad_enabled())

    for module in model.modules():
        module.register_forward_hook(look)
    with torch.enable_grad():
        scores = ZerothOrderPruning(perturb=perturb, **SMALL).score(calibration_of(model))
    assert seen
    assert not any(seen)
    assert not any(x.requires_grad for layers in scores.values() for x in layers)


def test_half_precision_weights_stay_as_they_were() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = ZerothOrderPruning(**SMALL).score(calibration_of(model))
    assert all(x.dtype == torch.float32 for x in scores["channel"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(3, []), (8, [0, 7]), (16, [0, 1, 14, 15]), (32, [0, 1, 2, 3, 29, 30, 31])],
)
def test_the_papers_share_of_layers_stays_whole(depth: int, expected: list[int]) -> None:
    small: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": depth}
    module = fitted(tiny_model("llama", **small), criterion="magnitude", sparsity=0.1)
    cut = [unit.source for unit in module.layout.layers if unit.keep]
    assert not set(cut) & set(expected)
    assert module.history[0]["options"]["protected_layers"] == expected
    if depth < 32:
        module = fitted(
            tiny_model("llama", **small), criterion="magnitude", sparsity=0.2, protected_layers=[1]
        )
        assert module.history[0]["options"]["protected_layers"] == [1]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"perturb": "gates", "criterion": "wanda"}, "criterion fms and gradient zeroth_order"),
        (
            {"perturb": "gates", "gradient": "backprop"},
            "where gates are perturbed, got fms and back",
        ),
        ({"gradient_samples": 0}, "gradient_samples of at least 1 and an epsilon above 0, got 0"),
        ({"epsilon": 0.0}, "an epsilon above 0, got 10 and 0"),
        ({"epsilon": float("nan")}, "an epsilon above 0, got 10 and nan"),
        ({"sparsity": 1.0}, "a sparsity from 0 to below 1, got 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        ZerothOrderPruning(**options)


def test_options_say_what_counted() -> None:
    assert ZerothOrderPruning().options() == {
        "axes": ["group", "channel"],
        "allocation": "uniform",
        "restoration": "none",
        "calibration": "128 x 512 tokens",
        "batch_size": 4,
        "protected_layers": [],
        "criterion": "fms",
        "gradient": "zeroth_order",
        "perturb": "weights",
        "epsilon": 1e-3,
        "gradient_samples": 10,
    }
    assert "gradient" not in ZerothOrderPruning(criterion="wanda").options()
    assert ZerothOrderPruning(perturb="gates").options()["epsilon"] == 1e-2


@pytest.mark.parametrize("options", [{}, {"perturb": "gates"}, {"gradient": "backprop"}])
def test_two_shares_score_as_the_whole(options: dict[str, Any]) -> None:
    """Two threads that meet whenever they reduce, with three windows and two for the gradient."""
    sums: list[Any] = [None, None]
    gate = threading.Barrier(2, timeout=60)
    models = [tiny_model("llama") for _ in range(2)]

    def score(rank: int) -> Any:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            sums[rank] = tensor
            gate.wait()
            total = sums[0] + sums[1]
            gate.wait()
            return total

        calibration = calibration_of(models[rank], ranks=Ranks(reduce))
        calibration.batches = calibration.batches[rank::2]
        callback = ZerothOrderPruning(**SMALL, **options)
        callback._share = (rank, 2)
        return callback.score(calibration)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(score, range(2))
    whole = ZerothOrderPruning(**SMALL, **options).score(calibration_of(tiny_model("llama")))
    for axis in BOTH:
        for one, two, expected in zip(first[axis], second[axis], whole[axis], strict=True):
            assert torch.equal(one, two)
            assert torch.allclose(one, expected, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_choose_the_units_of_one(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tests" / "zeroth_ranks.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = layouts()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) == alone
