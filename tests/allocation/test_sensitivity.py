"""Loss rises against really cutting one layer of a copy, and what layers give for them."""

from __future__ import annotations

import copy
import re
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocation.plan import Plan
from lit_prune.allocation.sensitivity import TRIAL, loss_rises, shares
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import Ranks, Restoration, by_columns, prune_layers, unit_scores
from lit_prune.errors import UserError
from lit_prune.scores import column_scores
from lit_prune.structure import Structure
from tests.literal_fasp import columns
from tests.structure.layouts import cuttable
from tests.structure.tiny import FAMILIES, tiny_model

Batch = dict[str, Tensor]


def batches(seed: int = 0, number: int = 2, rows: int = 4) -> list[Batch]:
    """Batches of two lengths, with padding and labels that are left out."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in (20, 13)[:number]:
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 11:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, :5] = -100
        result.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return result


HELD = 7


@torch.no_grad()
def loss(model: Any, data: list[Batch]) -> float:
    """Mean loss over all predicted tokens."""
    total, tokens = 0.0, 0
    for batch in data:
        number = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch, use_cache=False).loss) * number
        tokens += number
    return total / tokens


def by_inputs(weight: Tensor, x: InputStatistics) -> Tensor:
    return column_scores(weight, x.norms())


def rises_of(
    model: Any,
    axes: tuple[str, ...],
    how: Restoration,
    *,
    layers: tuple[int, ...] = (0, 1, 2),
    data: list[Batch] | None = None,
    held: list[Batch] | None = None,
    **options: Any,
) -> list[float]:
    structure = Structure.of(model)
    held = batches(HELD) if held is None else held
    return loss_rises(
        model,
        structure,
        Stream(model, structure, batches() if data is None else data),
        Stream(model, structure, held),
        lambda layer, axis, reader, seen: unit_scores(
            structure, layer, axis, reader, seen, by_inputs
        ),
        axes,
        layers=layers,
        restoration=how,
        ranks=options.pop("ranks", Ranks()),
        **options,
    )


def literal(model: Any, layer: int, axes: tuple[str, ...], how: Restoration) -> float:
    """Cut one layer of a copy, the layers before and behind it being dense."""
    other = copy.deepcopy(model)
    structure = Structure.of(other)
    sizes = structure.widths.layers[layer]
    removed = {axis: [0, 0, 0] for axis in axes}
    for axis in axes:
        removed[axis][layer] = min(round(0.6 * sizes[axis]), sizes[axis] - 1)
    prune_layers(
        other,
        structure,
        Stream(other, structure, batches()),
        by_columns(structure, by_inputs, Plan(removed, 0.0)),
        axes,
        restoration=how,
    )
    return loss(other, batches(HELD)) - loss(model, batches(HELD))


CASES = [
    (name, axes)
    for name in FAMILIES
    for axes in (("channel",), ("channel", "query"), ("group", "channel"))
    if set(axes) <= set(cuttable(Structure.of(tiny_model(name))))
]


@pytest.mark.parametrize(("name", "axes"), CASES, ids=[f"{n}-{'+'.join(a)}" for n, a in CASES])
def test_a_rise_is_that_of_a_copy_with_one_layer_cut(name: str, axes: tuple[str, ...]) -> None:
    how = Restoration(delta=1e-2)
    model, dense = tiny_model(name), tiny_model(name)
    found = rises_of(model, axes, how)
    expected = [literal(dense, layer, axes, how) for layer in range(3)]
    assert found == pytest.approx(expected, rel=5e-3, abs=5e-4)
    assert max(map(abs, expected)) > 0.005
    for value, before in zip(model.state_dict().values(), dense.state_dict().values(), strict=True):
        assert torch.equal(value, before)


@pytest.mark.parametrize("kind", ["none", "least_squares"])
@pytest.mark.parametrize("axes", [("channel",), ("value", "channel")])
def test_kinds_and_axes(kind: Any, axes: tuple[str, ...]) -> None:
    model = tiny_model("llama")
    how = Restoration(kind, ridge="zero", delta=0.05)
    expected = [literal(model, layer, axes, how) for layer in range(3)]
    assert rises_of(model, axes, how) == pytest.approx(expected, rel=5e-3, abs=5e-4)
    other = rises_of(
        model, axes, Restoration("none" if kind == "least_squares" else "least_squares")
    )
    assert other != pytest.approx(expected, rel=1e-2)


def test_only_some_layers_are_tried() -> None:
    model = tiny_model("llama")
    everything = rises_of(model, ("channel",), Restoration())
    tracked: list[int] = []

    def track(layers: Any) -> Iterator[int]:
        for layer in layers:
            tracked.append(layer)
            yield layer

    assert rises_of(model, ("channel",), Restoration(), layers=(1,), track=track) == [everything[1]]
    assert tracked == [0, 1], "what is behind the last is of no interest"
    assert rises_of(model, ("channel",), Restoration(), layers=(0, 2)) == everything[::2]


def test_modes_and_hooks_are_left_as_they_were() -> None:
    model = tiny_model("gpt2")
    expected = rises_of(model, ("channel",), Restoration())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.get_submodule("transformer.h.1").eval()
    modes = [module.training for module in model.modules()]
    assert rises_of(model, ("channel",), Restoration()) == expected, "dropout is off"
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("place", [("channel", 1), ("query", 0)])
def test_an_error_leaves_the_model_whole(place: tuple[str, int]) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    structure = Structure.of(model)

    def score(layer: int, axis: str, reader: nn.Module, seen: InputStatistics) -> Tensor:
        if (axis, layer) == place:
            raise KeyError
        return unit_scores(structure, layer, axis, reader, seen, by_inputs)

    held = batches(HELD)
    streams = [Stream(model, structure, data) for data in (batches(), held)]
    with pytest.raises(KeyError):
        loss_rises(
            model,
            structure,
            streams[0],
            streams[1],
            score,
            ("query", "channel"),
            layers=(0, 1, 2),
            restoration=Restoration(),
            ranks=Ranks(),
        )
    for value, before in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(value, before)


def test_processes_add_what_they_have_seen_and_lost() -> None:
    model = tiny_model("llama")
    expected = rises_of(model, ("query", "channel"), Restoration())
    # the second process first, which keeps what it adds
    parts: list[Tensor] = []
    twice = Ranks(reduce=lambda x: parts.append(x.clone()) or x)
    rises_of(model, ("query", "channel"), Restoration(), ranks=twice)
    rest = iter(parts)
    ranks = Ranks(reduce=lambda x: x + next(rest))
    found = rises_of(model, ("query", "channel"), Restoration(), data=[], held=[], ranks=ranks)
    assert found == expected
    assert next(rest, None) is None


@pytest.mark.parametrize("layer", range(3))
def test_a_layer_that_does_not_matter_gives_most(layer: int) -> None:
    model = tiny_model("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        columns(model, f"model.layers.{layer}.{name}").mul_(1e-3)
        model.get_parameter(f"model.layers.{layer}.{name}.bias").data.mul_(1e-3)
    # the loss of a random model may fall when it is cut, so its own predictions are the labels
    held = batches(HELD)
    with torch.no_grad():
        for batch in held:
            best = model(**{**batch, "labels": None}, use_cache=False).logits.argmax(-1)
            batch["labels"][:, 1:] = best[:, :-1].masked_fill(batch["labels"][:, 1:] == -100, -100)
    rises = rises_of(model, ("query", "channel"), Restoration(), held=held)
    assert abs(rises[layer]) < 0.05 * min(rise for n, rise in enumerate(rises) if n != layer)
    given = shares(rises, 0.2)
    assert max(range(3), key=given.__getitem__) == layer


def test_shares_are_roots_of_the_rises_inverse() -> None:
    rises = [0.157, 0.068, 0.01, 0.02, 0.0001, -0.3, 0.03]
    least = 0.05 * statistics.median(abs(rise) for rise in rises)
    expected = [1 / max(rise, least) ** 0.5 for rise in rises]
    assert shares(rises, 0.2) == pytest.approx(expected)
    assert shares([0.04, 0.01], 0.35) == pytest.approx([5, 10])
    assert shares([0.0016, 0.0001], 0.5) == pytest.approx([5, 10])


def test_where_nothing_matters_all_give_the_same() -> None:
    assert len(set(shares([0.0, 0.0, 0.0], 0.2))) == 1


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=re.escape("expected")) as caught:
        shares([0.1, float(value), 0.2], 0.2)
    assert "\n" not in str(caught.value)


def test_the_trial_takes_most_of_a_layer() -> None:
    assert TRIAL == 0.6
