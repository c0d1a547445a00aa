from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.gradients import layerwise as module
from lit_prune.gradients.folded import weight_gradients
from lit_prune.gradients.layerwise import layer_gradients
from lit_prune.structure import Structure
from tests.literal_taylor import make_batches
from tests.structure.tiny import FAMILIES, tiny_model


class Folded:
    """Keeps what is folded in."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], tuple[float, dict[str, Tensor], dict[str, Tensor]]] = {}
        self.order: list[Any] = []

    def fold(self, batch: int, loss: float, layer: int, weights: Any, gradients: Any) -> None:
        copies = [{role: x.clone() for role, x in rows.items()} for rows in (weights, gradients)]
        self.found[batch, layer] = (loss, copies[0], copies[1])
        self.order.append((layer, batch))

    def finish(self, layer: int, weights: Any) -> None:
        self.order.append((layer, "finish", sorted(weights)))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_plain_back_propagation(name: str) -> None:
    model = tiny_model(name)
    structure, batches = Structure.of(model), make_batches(3, padded=True)
    plain, layered = Folded(), Folded()
    weight_gradients(model, structure, batches, plain.fold)
    layer_gradients(model, structure, batches, layered.fold, layered.finish)
    assert plain.found.keys() == layered.found.keys()
    for key, (loss, weights, gradients) in plain.found.items():
        other_loss, other_weights, other = layered.found[key]
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other.keys() == gradients.keys() == weights.keys()
        for role, gradient in gradients.items():
            assert torch.equal(weights[role], other_weights[role])
            assert torch.allclose(other[role], gradient, rtol=1e-3, atol=1e-6), (key, role)
            assert gradient.abs().max() > 1e-5


def test_layers_come_from_the_last_to_the_first_and_are_told_when_complete() -> None:
    model = tiny_model("llama")
    structure, folded = Structure.of(model), Folded()
    layer_gradients(model, structure, make_batches(2), folded.fold, folded.finish)
    roles = ["down", "gate", "key", "output", "query", "up", "value"]
    expected: list[Any] = []
    for layer in (2, 1, 0):
        expected += [(layer, 0), (layer, 1), (layer, "finish", roles)]
    assert folded.order == expected


def test_without_batches_every_layer_is_complete() -> None:
    model = tiny_model("bloom")
    folded = Folded()
    layer_gradients(model, Structure.of(model), [], folded.fold, folded.finish)
    assert [entry[:2] for entry in folded.order] == [(i, "finish") for i in (2, 1, 0)]


def test_the_model_is_left_as_it_was() -> None:
    model: Any = tiny_model("llama").train()
    model.model.embed_tokens.weight.requires_grad_(False)
    own = torch.ones_like(model.lm_head.weight)
    model.lm_head.weight.grad = own
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    folded = Folded()
    layer_gradients(model, Structure.of(model), make_batches(2), folded.fold, folded.finish)
    assert model.training
    assert model.lm_head.weight.grad is own
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None or name == "lm_head.weight"
    for child in model.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks


def test_half_precision_goes_through_the_file_unchanged() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    structure, batches, plain, layered = (
        Structure.of(model),
        make_batches(2),
        Folded(),
        Folded(),
    )
    weight_gradients(model, structure, batches, plain.fold)
    layer_gradients(model, structure, batches, layered.fold, layered.finish)
    for key, (_, _, gradients) in plain.found.items():
        for role, gradient in gradients.items():
            assert layered.found[key][2][role].dtype == torch.bfloat16
            assert torch.equal(layered.found[key][2][role], gradient)


def alive() -> int:
    """Bytes of all tensors there are, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_one_layer_is_in_memory_at_a_time() -> None:
    layers, samples, length = 12, 30, 50
    model: Any = tiny_model("llama", num_hidden_layers=layers)
    structure = Structure.of(model)
    batches = make_batches(samples, length)
    gc.collect()
    before, peak = alive(), 0

    def fold(batch: int, loss: float, layer: int, weights: Any, gradients: Any) -> None:
        nonlocal peak
        if layer in (4, layers - 1) and batch in (0, samples - 1):  # it takes a while
            peak = max(peak, alive() - before)
        others = [
            p.grad
            for i, each in enumerate(model.model.layers)
            if i != layer
            for p in each.parameters()
        ]
        assert all(gradient is None for gradient in others)

    layer_gradients(model, structure, batches, fold, lambda layer, weights: None)
    one = sum(4 * p.numel() for p in model.model.layers[0].parameters())
    hidden = 4 * length * 36
    calls = 2 * 4 * length * 8  # cosines and sines, held once
    # gradients and views with their biases of weights and gradients; slopes, and two states
    assert peak < 3 * one + (samples + 3) * hidden + calls
    assert peak < samples * layers * hidden / 2


def test_the_way_to_the_loss_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    write = module._Tape.write

    def spy(tape: Any, hidden: Tensor) -> None:
        seen.append(hidden.requires_grad)
        write(tape, hidden)

    monkeypatch.setattr(module._Tape, "write", spy)
    model, folded = tiny_model("llama"), Folded()
    layer_gradients(model, Structure.of(model), make_batches(2), folded.fold, folded.finish)
    assert seen == [False] * 6


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *args: Any) -> None: ...

        def tell(self) -> int:
            return 0

        def write(self, content: Any) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", lambda **options: Full())
    model = tiny_model("llama")
    folded = Folded()
    with pytest.raises(UserError, match=r"got No space left on device; set TMPDIR") as caught:
        layer_gradients(model, Structure.of(model), make_batches(1), folded.fold, folded.finish)
    assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite_is_said() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.weight.data[0] = float("nan")
    folded = Folded()
    with pytest.raises(UserError, match="a finite loss"):
        layer_gradients(model, Structure.of(model), make_batches(1), folded.fold, folded.finish)
