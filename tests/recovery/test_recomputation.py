"""Without dropout a model computes what it does in eval mode, and may recompute its layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.recovery.recomputation import without_dropout
from lit_prune.structure import Structure
from tests.structure.tiny import FAMILIES, tiny_config, tiny_model
from tests.tiny_fit import token_ids


def dropping(name: str, **checkpointing: bool) -> tuple[Any, list[Any]]:
    """A model with every kind of dropout that its family has, and its layers."""
    rates: dict[str, Any] = {key: 0.5 for key in tiny_config(name).to_dict() if "drop" in key}
    model: Any = tiny_model(name, **rates)
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    return model, list(Structure.of(model).layers(model))


def logits(model: Any) -> Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def runs(layers: list[Any]) -> list[int]:
    """Counts how often a norm in each layer runs."""
    counts = [0] * len(layers)

    def counter(number: int) -> Any:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    for number, layer in enumerate(layers):
        norm = next(m for name, m in layer.named_modules() if "norm" in name or "ln_" in name)
        norm.register_forward_hook(counter(number))
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_eval_mode_does_and_recomputes_layers(name: str) -> None:
    model, layers = dropping(name, use_reentrant=False)
    before = [dict(vars(layer)) for layer in layers]
    expected = logits(model)
    expected.square().mean().backward()
    slopes = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    model.train()
    assert not torch.allclose(logits(model), expected, atol=0.1)
    counts = runs(layers)
    with without_dropout(model, layers):
        found = logits(model)
        assert torch.equal(found, expected)
        assert counts == [1, 1, 1]
        found.square().mean().backward()
        assert counts == [2, 2, 2]
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (slopes[key] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, slopes[key])
    assert not any(module.training for module in model.modules())
    for layer, values in zip(layers, before, strict=True):
        after = vars(layer)
        assert all(after[key] is values[key] for key in values if "drop" in key or key == "config")


def test_without_checkpointing_it_is_eval_mode() -> None:
    model, layers = dropping("opt")
    model.train()
    with without_dropout(model, layers):
        assert not any(module.training for module in model.modules())
        assert layers[0].dropout == 0.5


def test_the_config_that_others_share_stays() -> None:
    model, layers = dropping("falcon-rw", use_reentrant=False)
    with without_dropout(model, layers):
        assert layers[0].config.hidden_dropout == 0
        assert model.config.hidden_dropout == 0.5
    assert layers[0].config is model.config


def test_reentrant_checkpointing_is_off_with_a_warning() -> None:
    model, layers = dropping("llama", use_reentrant=True)
    counts = runs(layers)
    warned = pytest.warns(UserWarning, match="use_reentrant false while masks train, got")
    with warned as caught, without_dropout(model, layers):
        logits(model).mean().backward()
    assert counts == [1, 1, 1]
    assert len(caught) == 1
