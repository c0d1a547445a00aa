from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.calibration.stream import Stream
from lit_prune.modes import evaluating
from lit_prune.restoration.least_squares import Gram
from lit_prune.structure import Structure
from tests.structure.tiny import FAMILIES, tiny_model

Batch = dict[str, Tensor]


def batches(padded: str = "") -> list[Batch]:
    """Two full batches and one of another length; or padded on a side, with one full row."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for rows, length in ((2, 12), (2, 12), (3, 9)):
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(1, rows):
                pad = 2 * row + 1
                mask[row, length - pad :] = 0
                if padded == "left":
                    mask[row] = mask[row].flip(0)
        result.append({"input_ids": ids * mask, "attention_mask": mask})
    return result


def single(batch: Batch) -> list[Batch]:
    """The rows of a padded batch one by one, without their padding."""
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ids = [row[mask.bool()][None] for row, mask in rows]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def literal(model: Any, module: nn.Module, batch: Batch, *, output: bool = False) -> Tensor:
    """A module's first input, or its output, in a plain forward pass of the whole model."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        result = result[0] if isinstance(result, tuple) else result
        found = result if output else (args[0] if args else kwargs["hidden_states"])
        seen.append(found.clone())  # falcon adds to outputs in place

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    (found,) = seen
    return found


def setup(name: str) -> tuple[Any, Structure]:
    model = tiny_model(name)
    return model, Structure.of(model)


@pytest.mark.parametrize("padded", ["", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_stream_is_the_models_own_hidden_states(name: str, padded: str) -> None:
    model, structure = setup(name)
    stream, layers = Stream(model, structure, batches(padded)), structure.layers(model)
    assert len(stream) == 3
    for number in range(len(layers) + 1):
        for place, batch in enumerate(batches(padded)):
            last = number == len(layers)
            expected = literal(model, layers[number - last], batch, output=last)
            valid = batch["attention_mask"].bool()
            assert torch.equal(stream.hidden[place][valid], expected[valid])
        if number < len(layers):
            stream.advance(number)


@pytest.mark.parametrize("axis", ["channel", "group"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_reader_shows_its_inputs_without_padding(name: str, axis: str) -> None:
    model, structure = setup(name)
    stream = Stream(model, structure, batches("right"))
    for layer in range(2):
        reader = model.get_submodule(structure.readers(model, axis, layer)[0].path)
        seen: list[Tensor] = []
        before = [hidden.clone() for hidden in stream.hidden]
        stream.observe(layer, reader, seen.append)
        assert all(torch.equal(a, b) for a, b in zip(stream.hidden, before, strict=True))
        for x, batch in zip(seen, batches("right"), strict=True):
            found = literal(model, reader, batch)
            if found.dim() == 3:
                found = found[batch["attention_mask"].bool()]
            else:  # opt flattens its batch
                found = found[batch["attention_mask"].flatten().bool()]
            assert torch.equal(x, found)
        stream.advance(layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_gives_the_statistics_of_the_unpadded_one(name: str) -> None:
    model, structure = setup(name)
    padded = batches("right")
    grams = []
    for data in (padded, [row for batch in padded for row in single(batch)]):
        stream = Stream(model, structure, data)
        stream.advance(0)
        reader = model.get_submodule(structure.readers(model, "channel", 1)[0].path)
        gram = Gram(structure.widths.layers[1]["channel"])
        stream.observe(1, reader, gram.add)
        grams.append(gram.matrix)
    scale = grams[1].diagonal().sqrt()
    assert ((grams[0] - grams[1]).abs() / torch.outer(scale, scale)).max() < 1e-5
    assert sum(batch["attention_mask"].sum() for batch in padded) == 2 * (12 + 9) + 9 + 6 + 4


@pytest.mark.parametrize("padded", ["", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_played_attention_gives_the_same_stream(name: str, padded: str) -> None:
    model, structure = setup(name)
    plain, played = (Stream(model, structure, batches(padded)) for _ in range(2))
    attention = model.get_submodule(structure.readers(model, "group", 0)[0].path.rpartition(".")[0])
    reader = model.get_submodule(structure.readers(model, "channel", 0)[0].path)
    plain.advance(0)
    played.observe(0, reader, lambda x: None, record=attention)
    calls: list[int] = []
    handle = attention.register_forward_pre_hook(lambda *_: calls.append(1))
    for child in attention.children():
        child.register_forward_pre_hook(lambda *_: pytest.fail("attention was computed again"))
    played.advance(0, play=attention)
    handle.remove()
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain.hidden, played.hidden, strict=True))
    assert "forward" not in vars(attention)


def test_nothing_behind_the_reader_is_computed() -> None:
    model, structure = setup("llama")
    stream = Stream(model, structure, batches())
    done: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: done.append(name))
    reader = model.get_submodule("model.layers.0.self_attn.o_proj")
    stream.observe(0, reader, lambda x: None)
    assert "model.layers.0.self_attn.v_proj" in done
    assert not any("o_proj" in name or "mlp" in name for name in done)
    assert not any("layers.1" in name for name in done)


def test_entering_runs_no_layer() -> None:
    model, structure = setup("llama")
    done: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: done.append(name))
    # one short pass tells what the first layer returns; the rest only records
    Stream(model, structure, batches())
    assert not any("layers.1." in name or "layers.2." in name or "lm_head" in name for name in done)
    assert done.count("model.layers.0.mlp") == 1


def test_a_module_that_the_layer_does_not_call_is_an_error() -> None:
    model, structure = setup("llama")
    stream = Stream(model, structure, batches())
    with pytest.raises(RuntimeError, match="layer 0 did not call Linear"):
        stream.observe(0, model.lm_head, lambda x: None)


def test_hooks_and_functions_are_removed_after_an_error() -> None:
    model, structure = setup("llama")
    expected = model(**batches()[0]).logits
    stream = Stream(model, structure, batches())
    attention = model.get_submodule("model.layers.0.self_attn")

    def fail(x: Tensor) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        stream.observe(0, attention.o_proj, fail, record=attention)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )
    assert torch.equal(model(**batches()[0]).logits, expected)


def test_what_batches_share_is_held_once() -> None:
    model, structure = setup("qwen2")
    stream = Stream(model, structure, batches())
    for first, second in zip(stream._calls[0], stream._calls[1], strict=True):
        one, two = _tensors(first), _tensors(second)
        assert len(one) > 1
        assert all(a is b for a, b in zip(one, two, strict=True))
    stream.advance(0)
    assert all(calls[0] == ((), {}) for calls in stream._calls)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    if isinstance(values, (tuple, list)) or isinstance(value, dict):
        return [tensor for entry in values for tensor in _tensors(entry)]
    return []


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_dropout_is_off_and_the_mode_is_left_as_it_was(name: str) -> None:
    model, structure = setup(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        for attribute in ("dropout", "hidden_dropout"):  # where functions are called instead
            if isinstance(vars(module).get(attribute), float):
                setattr(module, attribute, 0.5)
    expected = Stream(model, structure, batches())
    model.train()
    last = structure.layers(model)[2].eval()
    modes = {module: module.training for module in model.modules()}
    found = Stream(model, structure, batches())
    assert {module: module.training for module in model.modules()} == modes
    for stream in (expected, found):
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            stream.advance(0)
    assert {module: module.training for module in model.modules()} == modes
    assert not last.training
    assert all(torch.equal(a, b) for a, b in zip(expected.hidden, found.hidden, strict=True))
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert {module: module.training for module in model.modules()} == modes


def test_a_process_may_have_no_batches() -> None:
    model, structure = setup("llama")
    stream = Stream(model, structure, [])
    assert len(stream) == 0
    reader = model.get_submodule("model.layers.0.mlp.down_proj")
    stream.observe(0, reader, lambda x: pytest.fail("there is nothing to see"))
    stream.advance(0)


def test_no_gradients_are_recorded() -> None:
    model, structure = setup("llama")
    stream = Stream(model, structure, batches())
    stream.advance(0)
    assert not any(hidden.requires_grad for hidden in stream.hidden)
