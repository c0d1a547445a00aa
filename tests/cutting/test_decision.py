"""What is between scores and a cut model, against models whose columns are held by hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.allocation.sensitivity import loss_rises, shares
from lit_prune.calibration.calibration import Calibration
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.cutting import decision
from lit_prune.cutting.layerwise import Ranks, Restoration, unit_scores
from lit_prune.structure import LayerUnits, Layout, Structure, cut
from lit_prune.structure.counting import unique_labels
from tests.cutting.test_layerwise_parts import (
    at_their_mean,
    batches,
    gone_columns,
    inputs_of,
    logits,
)
from tests.literal_fasp import columns, restored
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model


def calibration_of(model: Any, axes: tuple[str, ...], **options: Any) -> Calibration:
    return Calibration(model, Structure.of(model), batches(), axes, **options)


def score(weight: Tensor, x: InputStatistics) -> Tensor:
    """FLAP's, in short."""
    return x.variance * weight.float().square().sum(0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-7b"])
def test_columns_are_scored_by_dense_statistics(name: str) -> None:
    model = tiny_model(name)
    axes = ("channel", "query") if name != "gpt2" else ("channel", "group", "value")
    calibration = calibration_of(model, axes)
    found = decision.column_scores(calibration, score)
    assert set(found) == set(axes)
    for axis, layers in found.items():
        for layer, values in enumerate(layers):
            structure = calibration.structure
            path, sizes = (
                structure.readers(model, axis, layer)[0].path,
                structure.widths.layers[layer],
            )
            x, weight = inputs_of(model, path).double(), columns(model, path).double()
            entries = x.var(0, correction=0) * weight.square().sum(0)
            units = [values] if axis in ("channel", "group") else list(values)
            for group, row in enumerate(units):
                for unit, value in enumerate(row.tolist()):
                    keep: Any = [
                        [u for u in range(len(row)) if (g, u) != (group, unit)]
                        for g in range(len(units))
                    ]
                    keep = keep if axis in ("query", "value") else keep[0]
                    gone = gone_columns(axis, keep, sizes)
                    assert value == pytest.approx(entries[gone].sum().item(), rel=1e-3)


def test_what_a_method_gets_to_work_with() -> None:
    model = tiny_model("llama")
    calibration = calibration_of(model, ("query", "channel", "hidden"))
    assert calibration.labels == unique_labels(model, calibration.structure)
    assert calibration.labels is calibration.labels
    assert calibration.reader(2, "query") is model.get_submodule("model.layers.2.self_attn.o_proj")
    assert "moments" not in vars(calibration)
    assert set(calibration.moments) == {(n, a) for n in range(3) for a in ("query", "channel")}
    assert calibration.moments is calibration.moments
    assert list(calibration.track("scores")([3, 4])) == [3, 4]
    assert len(calibration.stream()) == 2
    assert len(calibration.stream(batches()[:1])) == 1


def test_a_progress_bar_says_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    calibration = calibration_of(tiny_model("llama"), ("channel",), title="FLAP", shown=True)
    assert calibration.moments
    assert "FLAP: statistics" in capsys.readouterr().err
    assert decision.column_scores(calibration, score)
    assert not capsys.readouterr().err, "they are there already"


@pytest.mark.parametrize("columnwise", [True, False])
def test_layers_give_by_the_loss_when_they_alone_are_cut(columnwise: bool) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    calibration = calibration_of(model, ("query", "channel"), held=batches(5))
    scores = decision.column_scores(calibration, score)
    how = Restoration()
    given = decision.layer_shares(calibration, score if columnwise else scores, 0.2, [1], how)
    structure = calibration.structure
    rises = loss_rises(
        dense,
        structure,
        calibration_of(dense, ()).stream(),
        calibration_of(dense, ()).stream(batches(5)),
        lambda layer, axis, reader, seen: (
            unit_scores(structure, layer, axis, reader, seen, score)
            if columnwise
            else scores[axis][layer]
        ),
        ("query", "channel"),
        layers=(0, 2),
        restoration=how,
        ranks=Ranks(),
    )
    first, last = shares(rises, 0.2)
    assert given == pytest.approx([first, 0.0, last], rel=1e-5)


@pytest.mark.parametrize(("goal", "power"), [(None, 0.5), (0.3, 0.5), (0.5, 0.25)])
def test_the_power_of_shares_is_chosen_by_all_cuts_together(goal: Any, power: float) -> None:
    calibration = calibration_of(
        tiny_model("llama"), ("channel",), held=batches(5), goal=goal, iteration=0
    )
    scores = decision.column_scores(calibration, score)

    def rises(*_: Any, **__: Any) -> list[float]:
        return [0.04, 0.01, 0.09]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decision, "loss_rises", rises)
        seen = decision.layer_shares(calibration, scores, 0.25, [], Restoration())
    assert seen == pytest.approx([rise**-power for rise in (0.04, 0.01, 0.09)])


def test_every_process_takes_the_first_ones_layout() -> None:
    model = tiny_model("llama")
    structure = Structure.of(model)
    mine = varied(structure, ("query", "channel", "hidden"), seed=0)
    others = varied(structure, ("query", "channel", "hidden"), seed=1)
    sent: list[dict[str, Tensor]] = []
    first = Ranks(agree=lambda own: sent.append(own) or own)
    found = decision.agreed(first, others)
    assert found.to_dict() == others.to_dict()
    ranks = Ranks(agree=lambda own: sent[0])
    assert decision.agreed(ranks, mine).to_dict() == others.to_dict()
    bare = Layout.full(structure.widths).replace_layer(1, {"channel": torch.arange(4)})
    assert decision.agreed(Ranks(), bare).to_dict() == bare.to_dict()


def heads_of(name: str) -> str:
    possible = cuttable(Structure.of(tiny_model(name)))
    return "group" if "group" in possible else "query"


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_restoration_it_is_a_cut(name: str, hidden: bool) -> None:
    model, reference = tiny_model(name), tiny_model(name)
    axes = (heads_of(name), "channel") + (("hidden",) if hidden else ())
    calibration = calibration_of(model, axes)
    layout = varied(calibration.structure, axes)
    cut(reference, Structure.of(reference), layout)
    decision.apply(calibration, layout, Restoration("none"))
    pairs = zip(model.named_parameters(), reference.named_parameters(), strict=True)
    assert all(key == other and torch.equal(a, b) for (key, a), (other, b) in pairs)
    left = layout.widths()
    assert calibration.structure.widths == left
    assert (left.shared["hidden"] < layout.of.shared["hidden"]) == hidden


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dense_means", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "falcon-7b", "falcon-new", "opt"])
def test_biases_hold_removed_columns_at_their_mean(
    name: str, dense_means: bool, hidden: bool
) -> None:
    """At that of the dense model or of the pruned one, whatever was measured before."""
    axes = (heads_of(name), "channel")
    model, reference = tiny_model(name), tiny_model(name).double()
    dense = logits(model)
    calibration = calibration_of(model, axes)
    layout = varied(calibration.structure, axes)
    kept = torch.arange(layout.of.shared["hidden"])
    if hidden:
        kept = kept[kept % 5 != 2]
        layout = Layout(layout.of, kept, layout.layers)
    assert dense_means or calibration.moments
    structure = Structure.of(reference)
    features = Layout(layout.of, kept, tuple(LayerUnits(layer) for layer in range(3)))
    if dense_means:  # of the model as it came
        at_their_mean(reference, structure, layout, dense=True)
    if hidden:
        cut(reference, structure, features)
    if not dense_means:
        at_their_mean(reference, structure, layout, dense=False)
    decision.apply(calibration, layout, Restoration("bias"), dense_means=dense_means)
    assert torch.allclose(logits(model).double(), logits(reference), atol=3e-4)
    assert (logits(model) - dense).abs().max() > 0.1


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("ridge", ["weights", "zero"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-7b", "gemma2"])
def test_least_squares_follows_the_cut_of_the_stream(name: str, ridge: Any, hidden: bool) -> None:
    """Columns are restored as the model with fewer features sees them, layer by layer."""
    axes, how = (heads_of(name), "channel"), Restoration("least_squares", ridge, 0.02)
    model, reference = tiny_model(name), tiny_model(name).double()
    calibration = calibration_of(model, axes)
    layout = varied(calibration.structure, (*axes, "hidden") if hidden else axes)
    decision.apply(calibration, layout, how)
    structure = Structure.of(reference)
    cut(reference, structure, Layout(layout.of, layout.hidden, tuple(map(LayerUnits, range(3)))))
    for unit in layout.layers:
        for axis in axes:
            path = structure.readers(reference, axis, unit.source)[0].path
            sizes, weight = structure.widths.layers[unit.source], columns(reference, path)
            gone = gone_columns(axis, unit.keep[axis], sizes)
            keep = [j for j in range(weight.shape[1]) if j not in gone]
            new = restored(weight, inputs_of(reference, path), keep, how)
            weight.zero_()
            weight[:, keep] = new
    assert torch.allclose(logits(model).double(), logits(reference), atol=1e-3)


def test_unit_scales_compare_with_the_model_as_it_came() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    dense, errors = inputs_of(model, "lm_head"), []
    runs: list[tuple[Any, Any]] = [(model, "unit_scales"), (plain, "none")]
    for which, kind in runs:
        calibration = calibration_of(which, ("query", "channel"))
        keep = {"channel": torch.arange(4, 20), "query": torch.tensor([[0, 1], [1, 2]])}
        layout = Layout.full(calibration.structure.widths).replace_layer(1, keep)
        decision.apply(calibration, layout, Restoration(kind))
        errors.append((inputs_of(which, "lm_head") - dense).square().sum().item())
    assert errors[0] < errors[1]


def test_modes_and_gradients_stay_as_they_were() -> None:
    kinds: list[Any] = ["none", "bias", "least_squares", "unit_scales"]
    for kind in kinds:
        model = tiny_model("gpt2").train()
        model.get_submodule("transformer.h.1").eval()
        model.get_parameter("transformer.wpe.weight").requires_grad_(False)
        modes = [module.training for module in model.modules()]
        calibration = calibration_of(model, ("group", "channel"))
        layout = varied(calibration.structure, ("group", "channel"))
        decision.apply(calibration, layout, Restoration(kind))
        assert [module.training for module in model.modules()] == modes
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen == ["transformer.wpe.weight"]
        assert all(p.is_leaf and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["none", "least_squares", "bias", "unit_scales"])
@pytest.mark.parametrize("dense_means", [False, True])
def test_layers_may_go_whole(kind: Any, dense_means: bool) -> None:
    """What stays is repaired as in the model that never had the other layers."""
    model: Any = tiny_model("llama")
    calibration = calibration_of(model, ("channel",))
    widths = calibration.structure.widths.copy()
    kept = torch.arange(3, 20)
    layers = (LayerUnits(0, {"channel": kept}), LayerUnits(2, {"channel": kept}))
    layout, how = Layout(widths, None, layers), Restoration(kind)
    decision.apply(calibration, layout, how, dense_means=dense_means)
    assert [sizes["channel"] for sizes in calibration.structure.widths.layers] == [17, 17]
    assert len(model.model.layers) == 2
    if dense_means and kind == "bias":  # means are those of the whole model
        return
    other: Any = tiny_model("llama")
    apart = calibration_of(other, ("channel",))
    cut(other, apart.structure, Layout(widths, None, (LayerUnits(0), LayerUnits(2))))
    same = tuple(LayerUnits(place, {"channel": kept}) for place in range(2))
    decision.apply(apart, Layout(apart.structure.widths.copy(), None, same), how)
    assert torch.equal(logits(model), logits(other))
