"""What modules show on the way of a stream, and models finished from where it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lit_prune.calibration.stream import Stream
from tests.calibration.test_calibration import Batch, batches, literal, setup
from tests.structure.tiny import FAMILIES


def rows_of(batch: Batch, x: Tensor) -> Tensor:
    """Activations without padding, [tokens, features]; opt flattens its batch."""
    valid = batch["attention_mask"].bool()
    return x[valid] if x.dim() == 3 else x[valid.flatten()]


@pytest.mark.parametrize("padded", ["", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_modules_show_inputs_and_outputs_on_the_way(name: str, padded: str) -> None:
    model, structure = setup(name)
    stream, other = (Stream(model, structure, batches(padded)) for _ in range(2))
    paths = [structure.readers(model, axis, 0)[0].path for axis in ("group", "channel")]
    modules = [model.get_submodule(path) for path in paths]
    seen: dict[tuple[nn.Module, bool], list[Tensor]] = {
        (module, output): [] for module in modules for output in (False, True)
    }
    functions = [
        {module: lambda x, m=module, o=output: seen[m, o].append(x.clone()) for module in modules}
        for output in (False, True)
    ]
    stream.advance(0, inputs=functions[0], outputs=functions[1])
    other.advance(0)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, other.hidden, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    for number, batch in enumerate(batches(padded)):
        for (module, output), found in seen.items():
            expected = literal(model, module, batch, output=output)
            assert torch.equal(found[number], rows_of(batch, expected))
        hidden = literal(model, structure.layers(model)[0], batch, output=True)
        assert torch.equal(stream.states(number), rows_of(batch, hidden))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon-7b", "falcon-new", "opt"])
def test_a_reader_shows_what_came_before_it_too(name: str) -> None:
    """Each batch's attention outputs come before what its FFN reads, also while they are kept."""
    model, structure = setup(name)
    stream = Stream(model, structure, batches("right"))
    attention, reader = (
        model.get_submodule(structure.readers(model, axis, 0)[0].path)
        for axis in ("group", "channel")
    )
    path = structure.readers(model, "group", 0)[0].path.rpartition(".")[0]
    seen: list[tuple[str, Tensor]] = []
    stream.observe(
        0,
        reader,
        lambda x: seen.append(("reads", x)),
        record=model.get_submodule(path),
        outputs={attention: lambda y: seen.append(("writes", y))},
    )
    assert [what for what, _ in seen] == ["writes", "reads"] * 3
    for number, batch in enumerate(batches("right")):
        expected = literal(model, attention, batch, output=True)
        assert torch.equal(seen[2 * number][1], rows_of(batch, expected))
        assert torch.equal(seen[2 * number + 1][1], rows_of(batch, literal(model, reader, batch)))
    assert not attention._forward_hooks


@pytest.mark.parametrize("padded", ["", "right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_finished_from_any_layer(name: str, padded: str) -> None:
    model, structure = setup(name)
    stream = Stream(model, structure, batches(padded))
    for number in range(len(structure.layers(model)) + 1):
        with torch.no_grad():
            for place, batch in enumerate(batches(padded)):
                expected = model(**batch, use_cache=False).logits
                valid = batch["attention_mask"].bool()
                found = stream.finish(model, number, place).logits
                assert torch.equal(found[valid], expected[valid])
        if number < len(structure.layers(model)):
            stream.advance(number)
    assert not any("forward" in vars(module) for module in model.modules())


def test_finishing_does_not_run_the_layers_behind_the_stream() -> None:
    model, structure = setup("llama")
    stream = Stream(model, structure, batches())
    expected = stream.finish(model, 0, 0).logits
    stream.advance(0)
    stream.advance(1)
    model.get_parameter("model.layers.1.mlp.down_proj.weight").data.fill_(float("nan"))
    assert torch.equal(stream.finish(model, 2, 0).logits, expected)
    assert not expected.requires_grad
