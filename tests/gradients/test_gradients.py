"""Gradients that are folded layer by layer, against plain autograd on the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lit_prune.errors import UserError
from lit_prune.gradients.folded import activation_gradients, labels_of, weight_gradients
from lit_prune.structure import Structure
from lit_prune.structure.coupling import names_of, view
from tests.structure.tiny import FAMILIES, tiny_model

Batch = dict[str, Tensor]
Rows = dict[str, Tensor]


def batches() -> list[Batch]:
    """Two batches of other sizes: padding on the right, and labels that are left out."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for rows, length in ((3, 9), (2, 7)):
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = labels[0, :3] = -100
        result.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return result


def setup(name: str) -> tuple[Any, Structure]:
    model = tiny_model(name, dtype=torch.float64)
    return model, Structure.of(model)


def plain(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """The loss summed over each row's labels, row by row and without padding, and their number."""
    total, number = torch.zeros((), dtype=torch.float64), 0
    for ids, mask, labels in zip(*batch.values(), strict=True):
        length = int(mask.sum())
        scores = model(input_ids=ids[None, :length], use_cache=False).logits[0].log_softmax(-1)
        for place in range(1, length):
            if labels[place] != -100:
                total = total - scores[place - 1, labels[place]]
                number += 1
    return total, number


close = partial(torch.allclose, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_gradients_are_autograds(name: str) -> None:
    model, structure = setup(name)
    reference, _ = setup(name)
    found: dict[tuple[int, int], tuple[float, Rows, Rows]] = {}

    def fold(batch: int, loss: float, layer: int, weights: Rows, gradients: Rows) -> None:
        kept = [{role: x.clone() for role, x in rows.items()} for rows in (weights, gradients)]
        assert (batch, layer) not in found
        found[batch, layer] = loss, kept[0], kept[1]

    weight_gradients(model, structure, batches(), fold)
    assert found.keys() == {(batch, layer) for batch in range(2) for layer in range(3)}
    for number, batch in enumerate(batches()):
        total, tokens = plain(reference, batch)
        reference.zero_grad()
        (total / tokens).backward()
        tensors = dict(reference.named_parameters())
        slopes = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
        for layer in range(3):
            loss, weights, gradients = found[number, layer]
            assert loss == pytest.approx((total / tokens).item(), rel=1e-5)
            for rows, source in ((weights, tensors), (gradients, slopes)):
                expected = view(reference, structure, layer, source)
                assert rows.keys() == expected.keys()
                assert all(close(rows[role], expected[role]) for role in rows)
            assert all(slope.abs().max() > 1e-6 for slope in gradients.values())


def values_of(model: Any, structure: Structure, data: list[Batch]) -> dict[tuple[int, int], Tensor]:
    found: dict[tuple[int, int], Tensor] = {}

    def fold(batch: int, loss: float, layer: int, weights: Rows, gradients: Rows) -> None:
        found[batch, layer] = gradients["value"].clone()

    weight_gradients(model, structure, data, fold)
    return found


def test_a_batch_without_labels_predicts_what_is_not_padded() -> None:
    model, structure = setup("llama")
    given, without = batches(), batches()
    for batch, other in zip(given, without, strict=True):
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        del other["labels"]
        assert torch.equal(labels_of(other), batch["labels"])
        assert labels_of(batch) is batch["labels"]
    expected, found = (values_of(model, structure, data) for data in (given, without))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = values_of(model, structure, batches())  # leaves three labels out of each
    assert not any(torch.equal(other[key], expected[key]) for key in expected)


def test_padding_on_the_left_changes_nothing() -> None:
    model, structure = setup("llama")
    padded = batches()
    for batch in padded:
        for row in range(len(batch["labels"])):
            shift = int((batch["attention_mask"][row] == 0).sum())
            for tensor in batch.values():
                tensor[row] = tensor[row].roll(shift)
        assert batch["attention_mask"][1, 0] == 0
    expected, found = (values_of(model, structure, data) for data in (batches(), padded))
    assert all(close(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon-7b"])
def test_one_layer_of_gradients_is_alive_at_a_time(name: str) -> None:
    model, structure = setup(name)
    earlier: list[StorageWeakRef] = []
    at_once: list[int] = []

    def fold(batch: int, loss: float, layer: int, weights: Rows, gradients: Rows) -> None:
        assert all(reference.expired() for reference in earlier), "another layer's are still there"
        assert not torch.is_grad_enabled()
        alive = {key for key, p in model.named_parameters() if p.grad is not None}
        assert alive == set(names_of(model, structure, layer))
        assert not any(rows.requires_grad for rows in (*weights.values(), *gradients.values()))
        earlier[:] = [
            StorageWeakRef(p.grad.untyped_storage())
            for p in model.parameters()
            if p.grad is not None
        ]
        at_once.append(len(earlier))

    weight_gradients(model, structure, batches(), fold)
    assert len(at_once) == 6
    assert all(p.grad is None for p in model.parameters())


def inputs(model: Any, paths: dict[str, str], data: list[Batch]) -> dict[str, list[Any]]:
    """Inputs of modules in plain forward passes, and their retained gradients, padding and all."""
    seen: dict[str, list[Tensor]] = {key: [] for key in paths}
    handles = []
    for key, path in paths.items():

        def hook(module: nn.Module, args: tuple[Tensor, ...], key: str = key) -> None:
            args[0].retain_grad()
            seen[key].append(args[0])

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))
    for batch in data:
        loss = model(**batch, use_cache=False).loss
        (loss * (batch["labels"][:, 1:] != -100).sum()).backward()
    for handle in handles:
        handle.remove()
    return {key: [(x.detach(), x.grad) for x in values] for key, values in seen.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_gradients_are_autograds_with_the_loss_summed(name: str) -> None:
    model, structure = setup(name)
    reference, _ = setup(name)
    axes = ("group", "channel")
    found: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}

    def fold(batch: int, layer: int, axis: str, x: Tensor, slope: Tensor) -> None:
        assert (batch, layer, axis) not in found
        assert all(p.grad is None for p in model.parameters()), "a weight got a gradient"
        found[batch, layer, axis] = x.clone(), slope.clone()

    activation_gradients(model, structure, batches(), axes, fold)
    keys = {f"{n} {a}": structure.readers(model, a, n)[0].path for n in range(3) for a in axes}
    expected = inputs(reference, keys, batches())
    assert found.keys() == {(b, n, a) for b in range(2) for n in range(3) for a in axes}
    for (number, layer, axis), (x, slope) in found.items():
        valid = batches()[number]["attention_mask"].bool().flatten()
        rows, slopes = (t.flatten(0, -2) for t in expected[f"{layer} {axis}"][number])
        assert len(x) == int(valid.sum())
        assert close(x, rows[valid])
        assert close(slope, slopes[valid])
        assert slope.abs().max() > 1e-6


def mark(model: nn.Module) -> dict[str, Tensor]:
    """Freeze some parameters, give others gradients, and put a module into another mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.get_submodule("transformer.h.1").eval()
    grads = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 > 0)
        if number % 3 == 1:
            parameter.grad = grads[name] = torch.full_like(parameter, 7.0)
    return grads


def state(model: nn.Module) -> Any:
    modes = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    accumulating = [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]
    return modes, hooks, accumulating, [p.requires_grad for p in model.parameters()]


def run_weights(model: Any, structure: Structure, fold: Any = lambda *_: None) -> None:
    weight_gradients(model, structure, batches(), fold)


def run_activations(model: Any, structure: Structure, fold: Any = lambda *_: None) -> None:
    activation_gradients(model, structure, batches(), ("channel", "group"), fold)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("run", [run_weights, run_activations])
def test_the_model_is_left_as_it_was(run: Callable[..., None], broken: bool) -> None:
    model, structure = setup("gpt2")
    if broken:
        model.get_parameter("transformer.ln_f.weight").data[3] = float("nan")
    grads, before = mark(model), state(model)
    values = [p.detach().clone() for p in model.parameters()]
    if broken:
        with pytest.raises(UserError, match="a finite loss on the calibration text, got nan") as e:
            run(model, structure)
        assert "\n" not in str(e.value)
    else:
        with torch.no_grad():
            run(model, structure)
    assert state(model) == before
    for (name, parameter), value in zip(model.named_parameters(), values, strict=True):
        assert parameter.detach().equal(value) or (broken and name == "transformer.ln_f.weight")
        assert parameter.grad is grads.get(name)
        assert name not in grads or bool((grads[name] == 7.0).all())


@pytest.mark.parametrize("run", [run_weights, run_activations])
def test_an_error_while_folding_leaves_nothing_behind(run: Callable[..., None]) -> None:
    model, structure = setup("gpt2")
    before = state(model)

    def fail(*args: Any) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        run(model, structure, fail)
    assert state(model) == before
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_off_and_batches_are_tracked() -> None:
    model, structure = setup("gpt2")
    expected, found = [], []
    weight_gradients(model, structure, batches(), lambda b, x, n, w, g: expected.append(x))
    mark(model)
    counted: list[int] = []

    def track(items: Any) -> Iterator[Any]:
        counted.append(len(items))
        yield from items

    weight_gradients(
        model, structure, batches(), lambda b, x, n, w, g: found.append(x), track=track
    )
    activation_gradients(model, structure, batches(), ["channel"], lambda *_: None, track=track)
    assert found == expected
    assert counted == [2, 2]
    weight_gradients(model, structure, [], lambda *_: pytest.fail("there is nothing to fold"))
