"""FASP against a slow reference that zeroes columns of the dense model in float64."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lit_prune.allocation.plan import Plan
from lit_prune.calibration import statistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import Ranks, Restoration, by_columns, prune_layers
from lit_prune.errors import UserError
from lit_prune.restoration.least_squares import Gram
from lit_prune.scores import column_scores
from lit_prune.structure import Layout, Structure, settle
from tests.literal_fasp import Batch, columns, literal
from tests.structure.layouts import cuttable
from tests.structure.tiny import FAMILIES, tiny_model

#: Layers that lose other numbers, and a layer that loses none.
REMOVED = {"group": [1, 0, 1], "query": [1, 0, 1], "channel": [7, 0, 11]}
CASES = [
    (name, axes)
    for name in FAMILIES
    for axes in (("channel",), ("group",), ("group", "channel"), ("query", "channel"))
    if {"group", "query"} & set(axes) <= set(cuttable(Structure.of(tiny_model(name))))
]


def batches(seed: int = 0, rows: int = 4, length: int = 40) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (2, rows, length), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def pruned(
    model: Any, plan: Plan, data: list[Batch] | None = None, **options: Any
) -> tuple[Layout, Structure]:
    structure = Structure.of(model)
    stream = Stream(model, structure, batches() if data is None else data)
    choose = by_columns(structure, lambda w, x: column_scores(w, x.norms()), plan)
    layout = prune_layers(model, structure, stream, choose, list(plan.removed), **options)
    settle(model, structure, layout)
    return layout, structure


def plan_for(*axes: str) -> Plan:
    return Plan({axis: REMOVED[axis] for axis in axes}, 0.0)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return torch.cat([model(input_ids=b["input_ids"], use_cache=False).logits for b in batches(9)])


def check_against_literal(name: str, axes: tuple[str, ...], how: Restoration) -> None:
    model, reference = tiny_model(name), tiny_model(name).double()
    dense = logits(model)
    plan, structure = plan_for(*axes), Structure.of(reference)
    expected = literal(reference, structure, plan, batches(), how)
    layout, left = pruned(model, plan, restoration=how)
    for layer, (units, kept) in enumerate(zip(layout.layers, expected, strict=True)):
        assert {axis: index.tolist() for axis, index in units.keep.items()} == kept
        for axis in axes:
            path = left.readers(model, axis, layer)[0].path
            columns_kept = columns(reference, path).abs().sum(0) != 0
            found = columns(model, path).double()
            assert torch.allclose(found, columns(reference, path)[:, columns_kept], atol=1e-4)
    assert torch.allclose(logits(model).double(), logits(reference), atol=5e-4)
    assert (logits(model) - dense).abs().max() > 0.1


@pytest.mark.parametrize(("name", "axes"), CASES, ids=[f"{n}-{'+'.join(a)}" for n, a in CASES])
def test_it_is_fasp(name: str, axes: tuple[str, ...]) -> None:
    # a float32 Gram matrix of 128 channels leaves a few 1e-4 of error at the default delta
    check_against_literal(name, axes, Restoration(delta=1e-2))


@pytest.mark.parametrize(
    "how",
    [
        Restoration(),
        Restoration("none"),
        Restoration(ridge="zero", delta=0.05),
        Restoration(ridge="weights", delta=0.05),
    ],
)
@pytest.mark.parametrize("axes", [("group", "channel"), ("query", "channel")])
def test_it_is_fasp_with_other_options(how: Restoration, axes: tuple[str, ...]) -> None:
    check_against_literal("llama", axes, how)


def test_a_layer_that_loses_nothing_is_left_as_it_is() -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    layout, _ = pruned(model, plan_for("group", "channel"))
    assert layout.layers[1].keep == {}
    layers = [m.get_submodule("model.layers.1").state_dict() for m in (model, dense)]
    assert all(torch.equal(layers[0][key], value) for key, value in layers[1].items())


@pytest.mark.parametrize("seed", range(5))
def test_planted_channels_and_heads_go_first(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = tiny_model("llama", seed=seed)
    plan = Plan({"query": [1, 1, 1], "channel": [6, 6, 6]}, 0.0)
    planted: list[dict[str, Any]] = []
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        channels = torch.randperm(20, generator=generator)[:6]
        heads = torch.randint(3, (2,), generator=generator)
        # by what a unit carries, not by its weights alone: small inputs behind large columns
        model.get_parameter(f"{prefix}.mlp.up_proj.weight").data[channels] *= 1e-4
        model.get_parameter(f"{prefix}.mlp.up_proj.bias").data[channels] *= 1e-4
        columns(model, f"{prefix}.mlp.down_proj")[:, channels] *= 20
        o_proj = columns(model, f"{prefix}.self_attn.o_proj").view(36, 2, 3, 8)
        for group, head in enumerate(heads):
            o_proj[:, group, head] *= 1e-4
        planted.append({"channel": set(channels.tolist()), "query": heads.tolist()})
    dense = logits(model)
    layout, _ = pruned(model, plan)
    for units, expected in zip(layout.layers, planted, strict=True):
        assert set(range(20)) - set(units.keep["channel"].tolist()) == expected["channel"]
        gone = [({0, 1, 2} - set(row)).pop() for row in units.keep["query"].tolist()]
        assert gone == expected["query"]
    assert (logits(model) - dense).abs().max() < 0.05 * dense.abs().max()


def test_restoration_makes_up_for_what_others_carry_too() -> None:
    dense = tiny_model("llama")
    for layer in range(3):  # channels 10 to 19 copy 0 to 9, but for what they are multiplied by
        for name in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
            values = dense.get_parameter(f"model.layers.{layer}.mlp.{name}").data
            values[10:] = values[:10]
    errors = []
    for kind in ("least_squares", "none"):
        model = copy.deepcopy(dense)
        first = Ranks(agree=lambda kept: {"channel": torch.arange(10)})
        how = Restoration(kind, delta=1e-6)
        pruned(model, Plan({"channel": [10] * 3}, 0.0), restoration=how, ranks=first)
        errors.append((logits(model) - logits(dense)).abs().max() / logits(dense).abs().max())
    assert errors[0] < 1e-3
    assert errors[1] > 0.1


def test_padding_enters_no_decision() -> None:
    data = batches()
    padded = copy.deepcopy(data)
    for batch in padded:
        ids, mask = (torch.nn.functional.pad(batch[key], (0, 6)) for key in batch)
        ids[:, 40:] = 7
        batch |= {"input_ids": ids, "attention_mask": mask}
    results = []
    for kind in (data, padded):
        model = tiny_model("llama")
        layout, _ = pruned(model, plan_for("query", "channel"), kind)
        results.append((layout.to_dict(), logits(model)))
    assert results[0][0] == results[1][0]
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


class Counted(Gram):
    """A Gram matrix of which no second one may be alive."""

    alive: ClassVar[weakref.WeakSet[Counted]] = weakref.WeakSet()
    made = 0

    def __init__(self, *args: Any) -> None:
        assert not Counted.alive, "another Gram matrix is still in memory"
        super().__init__(*args)
        Counted.alive.add(self)
        Counted.made += 1

    def add(self, x: Tensor) -> None:
        size = len(self.matrix)
        squares = [t for t in _tensors() if t.dim() == 2 and min(t.shape) == max(t.shape) == size]
        assert len(squares) == 1
        super().add(x)


def _tensors() -> list[Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) is Tensor]


def test_one_gram_matrix_and_the_stream_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "Gram", Counted)
    Counted.made = 0
    model = tiny_model("llama")
    held: list[int] = []

    def track(layers: range) -> Iterator[int]:
        for layer in layers:
            held.append(sum(t.shape[:2] == (5, 23) and t.dim() == 3 for t in _tensors()))
            yield layer

    plan = Plan({"query": [1, 1, 1], "channel": [3, 4, 5]}, 0.0)
    data = batches(rows=5, length=23)
    pruned(model, plan, data, track=track)
    assert Counted.made == 6
    assert not Counted.alive
    assert held == [len(data)] * 3


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("model.layers.1.self_attn.v_proj.weight", "calibration.*input of .*1.self_attn.o_proj"),
        ("model.layers.1.mlp.up_proj.bias", "calibration.*input of .*1.mlp.down_proj"),
        ("model.layers.2.mlp.down_proj.weight", "weights.*in .*2.mlp.down_proj"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(place: str, text: str, value: float) -> None:
    model = tiny_model("llama")
    model.get_parameter(place).data.view(-1)[3] = value
    model.train()
    plan = Plan({"query": [1, 1, 1], "channel": [3, 4, 5]}, 0.0)
    with pytest.raises(UserError, match=f"expected finite {text}") as caught:
        pruned(model, plan)
    assert "\n" not in str(caught.value)
    assert all(module.training for module in model.modules())


def test_the_mode_and_gradients_are_left_as_they_were() -> None:
    model = tiny_model("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.get_submodule("transformer.h.1").eval()
    model.get_parameter("transformer.wte.weight").requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    layout, _ = pruned(model, plan_for("group", "channel"))
    assert {name: module.training for name, module in model.named_modules()} == modes
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer.wte.weight"}
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())
    still = tiny_model("gpt2")
    again, _ = pruned(still, plan_for("group", "channel"))
    assert again.to_dict() == layout.to_dict()
    weights = zip(model.parameters(), still.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights), "dropout would give others"


def test_processes_add_their_statistics_and_take_one_decision() -> None:
    plan, results = plan_for("query", "channel"), []
    alone = tiny_model("llama")
    layout, _ = pruned(alone, plan)
    # the second process first, which keeps what it has seen at each reader of the pruned model
    parts: list[Tensor] = []
    pruned(
        tiny_model("llama"),
        plan,
        ranks=Ranks(reduce=lambda matrix: parts.append(matrix.clone()) or matrix),
    )
    for own in ([], None):
        model, rest = tiny_model("llama"), iter(parts)
        total = (lambda m, rest=rest: m + next(rest)) if own == [] else (lambda m: m)
        found, _ = pruned(model, plan, own, ranks=Ranks(reduce=total))
        results.append((found.to_dict(), logits(model)))
    for found, values in results:
        assert found == layout.to_dict()
        assert torch.equal(values, logits(alone))
    other = Ranks(agree=lambda kept: {axis: torch.zeros_like(k) + 2 for axis, k in kept.items()})
    told, _ = pruned(tiny_model("llama"), Plan({"query": [2, 2, 2]}, 0.0), ranks=other)
    assert [unit.keep["query"].tolist() for unit in told.layers] == [[[2], [2]]] * 3


def test_restoration_keeps_the_dtype() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    pruned(model, plan_for("query", "channel"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
