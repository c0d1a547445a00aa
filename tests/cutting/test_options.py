"""Options that all pruning methods share: what is refused, and what is reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from lit_prune import PrunableLM
from lit_prune.callbacks import (
    AdaptiveFusionPruning,
    CoupledComponentPruning,
    Distillation,
    FASPPruning,
    FLAPPruning,
    MagnitudePruning,
    RandomPruning,
    TaylorPruning,
    VIBPruning,
    WandaPruning,
    ZerothOrderPruning,
)
from lit_prune.cli.main import set_sparsity
from lit_prune.errors import UserError
from lit_prune.loading.opening import adopt
from lit_prune.structure import Layout, Structure, cut
from tests.fasp_ranks import Windows, trainer_of
from tests.structure.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
SMALL: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2}


def fitted(callback: Any, name: str = "llama", **options: Any) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model(name), **options)
    trainer_of(callback).fit(module, datamodule=Windows())
    return module


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        (FASPPruning, {"ridge": "weight"}, "ridge to be one of weights, zero, got 'weight'"),
        (FASPPruning, {"relative_to": "all"}, "relative_to to be one of decoder, total, got 'all'"),
        (FASPPruning, {"allocation": "even"}, "allocation to be one of uniform, global, sensi"),
        (FASPPruning, {"restoration": "ols"}, "restoration to be one of none, least_squares"),
        (FASPPruning, {"samples": 0}, "samples of at least 1, got 0"),
        (FASPPruning, {"every": 2}, "every with several iterations, got every 2 and one cut"),
        (
            WandaPruning,
            {"ridge": "zero"},
            "for ridge and delta, got none with zero",
        ),
        (
            FLAPPruning,
            {"delta": 0.1},
            "for ridge and delta, got bias .* 0.1",
        ),
        (FASPPruning, {"multiple": 8, "axes": ["group"]}, "channel or hidden.*got multiple 8"),
        (VIBPruning, {"multiple": 8, "axes": ["group"]}, "channel or hidden.*got multiple 8"),
        (
            FASPPruning,
            {"per_layer_ratio": 0.2, "relative_to": "total"},
            "per_layer_ratio with the uniform .* got uniform and total",
        ),
        (
            FASPPruning,
            {"per_layer_ratio": 0.2, "allocation": "global"},
            "per_layer_ratio with the uniform .* got global and decoder",
        ),
        (
            FASPPruning,
            {"per_layer_ratio": 0.2, "allocation": "sensitivity"},
            "per_layer_ratio with the uniform .* got sensitivity and decoder",
        ),
        (MagnitudePruning, {"norm": "l3"}, "norm to be one of l1, l2, got 'l3'"),
        (
            ZerothOrderPruning,
            {"gradient": "back-prop"},
            "gradient to be one of zeroth_order, backprop",
        ),
        (ZerothOrderPruning, {"perturb": "gate"}, "perturb to be one of weights, gates, got"),
        (ZerothOrderPruning, {"criterion": "foo"}, "criterion to be one of fms, wanda, magnitude"),
        (ZerothOrderPruning, {"samples": 8}, "gradient_samples out of the samples, got 10 of 8"),
        (
            AdaptiveFusionPruning,
            {"estimate": "mixed", "mixing": "depth"},
            "estimate fusion for mixing, .* got mixed with depth",
        ),
        (
            CoupledComponentPruning,
            {"ffn_step": 2, "axes": ["channel"], "multiple": 4},
            "ffn_step only where",
        ),
        (CoupledComponentPruning, {"ffn_step": 2, "axes": ["query"]}, "ffn_step only where"),
        (FASPPruning, {"axes": ["channel", "channel"]}, "each of axes once, got channel twice"),
        (
            FASPPruning,
            {"protected_layers": [2, 0, 2]},
            "each of protected_layers once, got 2 twice",
        ),
        (
            AdaptiveFusionPruning,
            {"weighting": "loss", "smoothing": True},
            "weighting uniform with smoothing, .* got loss",
        ),
        (
            ZerothOrderPruning,
            {"criterion": "wanda", "gradient": "backprop"},
            "gradient only with criterion fms or gradient, got 'backprop'",
        ),
        (
            ZerothOrderPruning,
            {"criterion": "magnitude", "gradient_samples": 4},
            "gradient_samples only with criterion fms or gradient, got 4",
        ),
        (
            ZerothOrderPruning,
            {"criterion": "wanda", "epsilon": 0.1},
            "epsilon only with criterion fms or gradient, got 0.1",
        ),
        (
            ZerothOrderPruning,
            {"gradient": "backprop", "epsilon": 0.1},
            "epsilon only with gradient zeroth_order, got 0.1",
        ),
        (
            TaylorPruning,
            {"estimate": "vector", "fisher_scale": "tokens"},
            "fisher_scale only with an estimate that has second-order terms, got 'tokens'",
        ),
        (
            AdaptiveFusionPruning,
            {"estimate": "element1", "fisher_scale": "tokens"},
            "fisher_scale only with an estimate that has second-order terms, got 'tokens'",
        ),
        (
            VIBPruning,
            {"axes": ["group", "channel"], "norm_rescale": "none"},
            "norm_rescale only with the axis hidden, got 'none'",
        ),
        (
            CoupledComponentPruning,
            {"axes": ["channel"], "norm_rescale": "none"},
            "norm_rescale only with the axis hidden, got 'none'",
        ),
        (
            Distillation,
            {"kl": 0.0, "temperature": 2.0},
            "temperature only with a kl above 0, got 2",
        ),
        (
            Distillation,
            {"hidden_every": 2},
            "hidden_every only with a weight hidden above 0, got 2",
        ),
    ],
)
def test_what_would_not_count_is_refused(kind: Any, options: Any, text: str) -> None:
    with pytest.raises(UserError, match=f"expected .*{text}") as caught:
        kind(**options)
    assert "\n" not in str(caught.value)


def test_what_does_not_count_by_default_is_silent() -> None:
    ZerothOrderPruning(criterion="wanda", samples=8)
    AdaptiveFusionPruning(estimate="vector")
    assert "fisher_scale" not in AdaptiveFusionPruning(estimate="element1").options()
    assert "fisher_scale" in AdaptiveFusionPruning(estimate="mixed").options()
    assert "fisher_scale" not in TaylorPruning(estimate="vector").options()
    assert "fisher_scale" in TaylorPruning(estimate="element2").options()


def test_a_bias_that_the_stock_config_has_not_is_refused() -> None:
    flap = FLAPPruning(allocation="uniform", **SMALL)
    with pytest.raises(UserError, match=r"no bias for .*, got bias; choose least_squares"):
        fitted(flap, "mistral", stock=True)
    assert fitted(FLAPPruning(allocation="uniform", **SMALL), stock=True).is_stock
    assert not fitted(FLAPPruning(allocation="uniform", **SMALL), "mistral").is_stock


@pytest.mark.parametrize("options", [{"allocation": "global"}, {}])
def test_multiples_that_undo_the_pruning_are_refused(options: Any) -> None:
    with pytest.raises(UserError, match=r"a multiple that .* got 128, with which 0.000 of"):
        fitted(FASPPruning(0.2, multiple=128, **options, **SMALL))
    module = fitted(FASPPruning(0.2, multiple=4, **options, **SMALL))
    widths = [sizes["channel"] for sizes in module.structure.widths.layers]
    assert all(width % 4 == 0 for width in widths)
    assert min(widths) < 20


def test_widths_that_come_far_from_the_target_are_told() -> None:
    with pytest.warns(UserWarning, match=r"to remove 20.00% of .* FASP removed 12.5"):
        fitted(FASPPruning(0.2, multiple=12, **SMALL))


def test_of_several_cuts_only_the_last_must_come_near() -> None:
    callback = FASPPruning(0.1, multiple=4, iterations=8, allocation="global", **SMALL)
    reached = fitted(callback).history[0]["sparsity"]["decoder"]
    assert reached == pytest.approx(0.1, abs=0.05)


def test_a_ratio_of_each_layer_is_met_where_layers_differ() -> None:
    """As in a model that was pruned before."""
    model = tiny_model("llama")
    structure = Structure.of(model)
    layout = Layout.full(structure.widths).replace_layer(0, {"channel": torch.arange(4)})
    with torch.no_grad():
        cut(model, structure, layout)
    callback = WandaPruning(per_layer_ratio=0.2, protected_layers=[0], **SMALL)
    dense = [parameters_of(layer) for layer in structure.layers(model)]
    module = PrunableLM("tiny", dtype="auto")
    adopt(module, model, structure.widths)
    module.model = model
    trainer_of(callback).fit(module, datamodule=Windows())
    left = [parameters_of(layer) for layer in module.structure.layers(module.model)]
    assert left[0] == dense[0]
    assert [1 - a / b for a, b in zip(left, dense, strict=True)][1:] == pytest.approx(
        [0.2, 0.2], abs=0.01
    )
    (entry,) = module.history
    assert entry["sparsity"]["target"] == pytest.approx(0.2 * sum(dense[1:]) / sum(dense))


def parameters_of(layer: Any) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("options", "listed", "target"),
    [
        ({"per_layer_ratio": 0.2, "protected_layers": [1]}, {"per_layer_ratio": 0.2}, 0.4 / 3),
        ({"seed": 3}, {"seed": 3}, 0.2),
        ({}, {}, 0.2),
    ],
)
def test_the_target_is_what_was_aimed_at(options: Any, listed: Any, target: float) -> None:
    (entry,) = fitted(WandaPruning(0.2, **options, **SMALL)).history
    assert entry["sparsity"]["target"] == pytest.approx(target)
    assert entry["sparsity"]["decoder"] == pytest.approx(target, abs=0.005)
    assert {k: entry["options"].get(k) for k in ("per_layer_ratio", "seed")} == {
        "per_layer_ratio": None,
        "seed": None,
        **listed,
    }


def test_a_share_of_all_parameters_is_recorded_as_one_of_the_decoder() -> None:
    (entry,) = fitted(WandaPruning(0.1, relative_to="total", **SMALL)).history
    assert entry["sparsity"]["total"] == pytest.approx(0.1, abs=0.004)
    assert entry["sparsity"]["target"] > 0.105
    assert entry["sparsity"]["decoder"] == pytest.approx(entry["sparsity"]["target"], abs=0.004)
    assert entry["options"]["relative_to"] == "total"
    assert entry["options"]["sparsity"] == 0.1


def test_what_says_how_much_instead() -> None:
    assert FASPPruning.instead_of_sparsity({"sparsity": 0.3, "iterations": 2}) is None
    assert FASPPruning.instead_of_sparsity({"per_layer_ratio": 0.0}) == "per_layer_ratio"
    cce = CoupledComponentPruning.instead_of_sparsity
    assert cce({"iterations": 2}) == "iterations"
    assert cce({"iterations": 2, "allocation": "global"}) is None
    assert cce({"iterations": 2, "multiple": 4}) is None
    assert cce({"iterations": None}) is None


@pytest.mark.parametrize(
    ("name", "options", "instead"),
    [
        ("FASPPruning", {"per_layer_ratio": 0.2}, "per_layer_ratio"),
        ("CoupledComponentPruning", {"iterations": 1}, "iterations"),
        ("CoupledComponentPruning", {}, None),
    ],
)
def test_a_sparsity_on_the_command_line_counts_or_is_refused(
    name: str, options: Any, instead: str | None
) -> None:
    arguments = Namespace(**{"sparsity": 0.2, "per_layer_ratio": None, **options})
    callback = Namespace(class_path=f"lit_prune.callbacks.{name}", init_args=arguments)
    config = Namespace(trainer=Namespace(callbacks=[callback]), sparsity=0.4)
    if instead is None:
        set_sparsity(config)
        assert arguments.sparsity == 0.4
        return
    with pytest.raises(UserError, match=f"--sparsity or {instead}, .* set {instead} to null"):
        set_sparsity(config)
    assert arguments.sparsity == 0.2


class NoTokens(Windows):
    """Has none for calibration."""

    def calibration_batches(self, *args: Any, **options: Any) -> Any:
        if args == (2, 8, 2):
            return super().calibration_batches(*args, **options)
        raise UserError("expected more text")


@pytest.mark.parametrize("kind", [MagnitudePruning, RandomPruning])
def test_methods_that_look_at_no_token_draw_none(kind: Any) -> None:
    module = PrunableLM.from_model(tiny_model("llama"))
    with pytest.warns(UserWarning, match="looks at no calibration tokens, so that samples do not"):
        trainer_of(kind(0.2, samples=10**6)).fit(module, datamodule=NoTokens())
    assert "calibration" not in module.history[0]["options"]
    for options in ({"restoration": "bias"}, {"allocation": "sensitivity"}):
        callback = kind(0.2, **options, **SMALL)
        assert "calibration" in callback.options()
        with pytest.raises(UserError, match="more text"):
            trainer_of(callback).fit(
                PrunableLM.from_model(tiny_model("llama")), datamodule=NoTokens()
            )


def test_an_even_plan_is_not_asked_of_the_global_allocation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UserError("expected another target")

    monkeypatch.setattr("lit_prune.allocation.planning.uniform", refuse)
    fitted(WandaPruning(0.2, allocation="global", **SMALL))
    with pytest.raises(UserError, match="another target"):
        fitted(WandaPruning(0.2, **SMALL))
    data, callback = Windows(), WandaPruning(0.9, allocation="global", **SMALL)
    with pytest.raises(UserError, match=r"can reach, got 0.9; the most is 0.297"):
        trainer_of(callback).fit(PrunableLM.from_model(tiny_model("llama")), datamodule=data)
    assert (4, 16, 2) not in data.asked


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_means_for_biases_are_the_methods_choice(allocation: Any) -> None:
    """FASP's are those of the pruned model, whatever was measured for its scores."""
    plain = fitted(FASPPruning(0.3, allocation=allocation, restoration="none", **SMALL))
    module = fitted(FASPPruning(0.3, allocation=allocation, restoration="bias", **SMALL))
    dense = fitted(_DenseMeans(0.3, allocation="global", restoration="bias", **SMALL))
    assert plain.layout.to_dict() == module.layout.to_dict()
    name = "model.layers.{}.mlp.down_proj.bias"
    if allocation == "global":
        for layer, same in ((0, True), (2, False)):
            one, other = (m.model.get_parameter(name.format(layer)) for m in (module, dense))
            assert torch.allclose(one, other, atol=1e-5) is same


class _DenseMeans(FASPPruning):
    dense_means = True
