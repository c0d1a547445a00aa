"""Out of memory in calibration: the result of smaller batches, said aloud, and nothing twice."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune import notes
from lit_prune.allocation.plan import Plan
from lit_prune.calibration.calibration import Calibration, with_smaller_batches
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.decision import layer_shares, narrow_stream
from lit_prune.cutting.layerwise import Ranks, Repair, Restoration, by_columns, prune_layers
from lit_prune.errors import UserError
from lit_prune.masks.masking import loss_on
from lit_prune.memory import fits, halves, in_halves, is_out_of_memory, shown
from lit_prune.notes import noting
from lit_prune.restoration import tuning
from lit_prune.restoration.least_squares import Gram
from lit_prune.scores import column_scores
from lit_prune.structure import Layout, Structure
from tests.crowded import CPU_MESSAGE, TOKENS, batches, crowded, windows
from tests.structure.tiny import FAMILIES, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*memory ran out")


def pruned(model: Any, size: int, kind: Repair, padded: str = "") -> Layout:
    structure = Structure.of(model)
    streams = [Stream(model, structure, batches(size, padded)) for _ in range(2)]
    plan = Plan({"group": [1, 1, 0], "channel": [5, 4, 6]}, 0.0)
    if structure.widths.layers[0]["group"] == 1:
        plan.removed.pop("group")
    choose = by_columns(structure, lambda w, x: column_scores(w, x.norms()), plan)
    how = Restoration(kind, delta=1e-2)
    axes = list(plan.removed)
    return prune_layers(
        model, structure, streams[0], choose, axes, restoration=how, dense=streams[1]
    )


def assert_close(model: nn.Module, other: nn.Module) -> None:
    for (name, value), found in zip(model.named_parameters(), other.parameters(), strict=True):
        assert value.shape == found.shape, name
        assert torch.allclose(value, found, rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize(
    ("part", "padded"), [("ffn", ""), ("attention", "right"), ("layer", "left")]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_pruned_as_with_smaller_batches(name: str, part: str, padded: str) -> None:
    kind: Repair = "unit_scales" if part == "attention" else "least_squares"
    model, expected = tiny_model(name), tiny_model(name)
    layout = pruned(expected, 2, kind, padded)
    with crowded(model, 2, part, window=TOKENS) as failures, noting() as found:
        assert pruned(model, 4, kind, padded).to_dict() == layout.to_dict()
    assert set(failures) == {4}
    assert_close(model, expected)
    (text,) = found  # once, however often
    assert text.startswith("memory ran out with 4 calibration windows of 12 tokens at once; went")


def test_it_is_tried_until_it_fits() -> None:
    model, expected = tiny_model("llama"), tiny_model("llama")
    pruned(expected, 1, "least_squares")
    with crowded(model, 1) as failures, noting() as found:
        pruned(model, 8, "least_squares")
    assert failures[:4] == [8, 4, 2, 2]
    assert len(found) == 3
    assert_close(model, expected)


def test_a_batch_too_large_to_enter() -> None:
    model: Any = tiny_model("llama")
    structure = Structure.of(model)
    embedding = model.get_input_embeddings()

    def hook(module: nn.Module, args: Any) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    embedding.register_forward_pre_hook(hook)
    stream = Stream(model, structure, batches(4))
    assert [len(hidden) for hidden in stream.hidden] == [2, 2, 2, 2]
    together = torch.cat([batch["input_ids"] for batch in stream.batches])
    assert torch.equal(together, windows()["input_ids"])


def test_odd_batches_and_what_stays_of_them() -> None:
    model = tiny_model("llama")
    structure = Structure.of(model)
    stream, other = Stream(model, structure, batches(5)), Stream(model, structure, batches(5))
    for layer in range(2):
        with crowded(model, 2, layer=1):
            stream.advance(layer)
        other.advance(layer)
    assert [len(batch["input_ids"]) for batch in stream.batches] == [2, 1, 2, 2, 1]
    assert torch.allclose(torch.cat(stream.hidden), torch.cat(other.hidden), atol=1e-6)
    for calls in stream._calls:  # of layers behind nothing is held
        assert [any(call) for call in calls] == [False, False, True]


def crowd(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let statistics of too many tokens run out of memory."""
    add, seen = Gram.add, []

    def careful(gram: Gram, x: Tensor) -> None:
        if len(x) > most:
            raise RuntimeError(CPU_MESSAGE)
        seen.append(len(x))
        add(gram, x)

    monkeypatch.setattr(Gram, "add", careful)
    return seen


@pytest.mark.parametrize("kind", ["least_squares", "unit_scales"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon-new"])
def test_statistics_too_large_at_once(
    name: str, kind: Repair, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = tiny_model(name), tiny_model(name)
    layout = pruned(expected, 4, kind)
    seen = crowd(monkeypatch, 20)
    with noting() as found:
        assert pruned(model, 4, kind).to_dict() == layout.to_dict()
    assert max(seen) <= 20
    assert_close(model, expected)
    assert [text.split(" at once")[0] for text in found] == [
        "memory ran out in statistics of 48 tokens",
        "memory ran out in statistics of 24 tokens",
    ]


def test_what_does_not_fit_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd(monkeypatch, 5)
    statistics, x = InputStatistics(3, "cpu", gram=True), torch.randn(13, 3)
    statistics.add(x[:4])
    with pytest.raises(RuntimeError):
        statistics.add(x[4:])
    shown(statistics.add, x[4:])
    assert statistics.tokens == 13
    assert torch.allclose(statistics.mean, x.mean(0), atol=1e-6)
    assert torch.allclose(statistics.variance, x.var(0, correction=0), atol=1e-6)
    assert statistics.gram is not None
    assert torch.allclose(statistics.gram.matrix, x.T @ x, atol=1e-5)


def test_the_loss_without_a_layer() -> None:
    shares = []
    for most in (9, 2):
        model = tiny_model("llama")
        structure = Structure.of(model)
        calibration = Calibration(model, structure, batches(4), ("channel",), held=batches(4))
        scores = {"channel": [torch.arange(20.0)] * 3}
        with crowded(model, most, layer=2) as failures:
            shares.append(layer_shares(calibration, scores, 0.2, (), Restoration("none")))
        assert bool(failures) == (most == 2)
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)


def once(function: Any, calls: list[int]) -> Any:
    """A function that runs out of memory when it is called for the second time."""

    def careful(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError(CPU_MESSAGE)
        return function(*args, **kwargs)

    return careful


@pytest.mark.parametrize(
    "place",
    ["torch.var_mean", "lit_prune.restoration.tuning.exact_products", "torch.Tensor.addmm_"],
)
def test_nothing_is_counted_twice(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = tiny_model("llama"), tiny_model("llama")
    pruned(expected, 4, "unit_scales")
    calls: list[int] = []
    owner, _, name = place.rpartition(".")
    where = {"torch": torch, "torch.Tensor": Tensor}.get(owner, tuning)
    monkeypatch.setattr(where, name, once(getattr(where, name), calls))
    pruned(model, 4, "unit_scales")
    assert len(calls) > 2
    assert_close(model, expected)


@torch.no_grad()
def test_the_loss_of_masked_models_and_energies_of_features() -> None:
    model = tiny_model("llama")
    structure, expected = Structure.of(model), tiny_model("llama")
    loss = loss_on(model, batches(4), Ranks())
    layout = Layout(structure.widths, torch.arange(30), Layout.full(structure.widths).layers)
    other = Calibration(expected, Structure.of(expected), batches(4), ("hidden",))
    narrow_stream(other, layout, "calibrated")
    with crowded(model, 3) as failures:
        assert loss_on(model, batches(4), Ranks()) == pytest.approx(loss, rel=1e-5)
        assert failures == [4, 4]
        calibration = Calibration(model, structure, batches(4), ("hidden",))
        narrow_stream(calibration, layout, "calibrated")
    assert failures == [4] * 4
    assert_close(model, expected)


def huge(rows: Tensor) -> None:
    torch.empty(1 << 60)


@pytest.mark.parametrize("part", ["ffn", "layer"])
def test_a_single_window_too_large(part: str) -> None:
    model = tiny_model("llama")
    with crowded(model, 0, part), pytest.raises(UserError, match="of 12 tokens") as caught:
        pruned(model, 2, "least_squares")
    assert "\n" not in str(caught.value)
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UserError, match="of 7 features"):
        shown(huge, torch.zeros(4, 7))


def test_other_errors_are_not_retried() -> None:
    model = tiny_model("llama")
    with crowded(model, 2, error=KeyError), pytest.raises(KeyError):
        pruned(model, 4, "least_squares")
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        fits(fail)
    assert calls == [1]


def test_what_memory_errors_look_like() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)  # of this very PyTorch
    assert is_out_of_memory(caught.value)
    cuda = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    assert all(map(is_out_of_memory, (cuda, torch.OutOfMemoryError("x"), MemoryError())))
    assert not is_out_of_memory(RuntimeError("x"))


def test_order_is_kept() -> None:
    seen: list[int] = []

    def run(batch: Any) -> None:
        if len(batch["input_ids"]) > 3:
            raise torch.OutOfMemoryError("out of memory")
        seen.extend(batch["input_ids"][:, 0].tolist())

    in_halves(batches(5), run)
    assert seen == windows()["input_ids"][:, 0].tolist()


def test_nothing_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="memory ran out with 4 calibration windows of 12 tokens"):
        halves(batches(4)[0])
    monkeypatch.setattr(notes, "several_processes", lambda: True)
    monkeypatch.setattr(notes.distributed, "get_rank", lambda: 1)
    with pytest.warns(UserWarning, match="process 1: memory ran out"):
        halves(batches(4)[0])
    with noting() as found, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        halves(batches(4)[0])
    assert found[0].startswith("process 1")
    with noting() as found:
        pass
    assert found == []


def test_several_processes_can_not_try_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    calibration = Calibration(model, Structure.of(model), batches(4), ("channel",))
    monkeypatch.setattr("lit_prune.calibration.calibration.several_processes", lambda: True)

    def run(own: Calibration) -> None:
        if len(own.batches[0]["input_ids"]) > 2:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UserError, match="lower the method's batch_size") as caught:
        with_smaller_batches(calibration, run)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("lit_prune.calibration.calibration.several_processes", lambda: False)
    _, smaller = with_smaller_batches(calibration, run)
    assert [len(batch["input_ids"]) for batch in smaller.batches] == [2, 2, 2, 2]
    assert len(calibration.batches) == 2


def test_memory_is_given_back_before_it_is_tried_again() -> None:
    held: list[Any] = []

    def fail() -> None:
        taken = torch.zeros(3)
        held.append(weakref.ref(taken))
        raise torch.OutOfMemoryError("out of memory")

    gc.disable()
    try:
        assert not fits(fail)
        assert held[0]() is None
    finally:
        gc.enable()
