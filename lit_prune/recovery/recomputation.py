"""Gradient checkpointing of a model that runs without dropout."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn


@contextmanager
def without_dropout(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Put a model into eval mode in which gradient checkpointing works; eval mode afterwards.

    transformers recomputes a layer in the backward pass only if the layer itself is in training
    mode. So such a layer is, and nothing within it; its own dropout gets a rate of 0. Reentrant
    checkpointing can't go back through what layers share, such as masks, and stays off.

    Args:
        model: A causal language model.
        layers: Its decoder layers.
    """
    model.eval()
    chosen = [layer for layer in layers if getattr(layer, "gradient_checkpointing", False)]
    able = [layer for layer in chosen if not _is_reentrant(layer)]
    if len(able) < len(chosen):
        rank_zero_warn(
            "expected gradient checkpointing with use_reentrant false while masks train, got the "
            "reentrant one, which is off until the cut; enable it with "
            'gradient_checkpointing_enable({"use_reentrant": False})'
        )
    with ExitStack() as stack:
        stack.callback(model.eval)
        for layer in able:
            layer.training = True
            _silence(layer, stack)
        yield


def _is_reentrant(layer: nn.Module) -> bool:
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", False)


def _silence(layer: nn.Module, stack: ExitStack) -> None:
    """Set what a layer's own forward pass drops with to 0, in the layer and in its config."""
    own, config = vars(layer), vars(layer).get("config")
    changes: dict[str, Any] = dict.fromkeys(_rates(own), 0.0)
    if config is not None:
        changes["config"] = copy.copy(config)  # other modules share it
        for name in _rates(vars(config)):
            setattr(changes["config"], name, 0.0)
    for name, value in changes.items():
        stack.callback(setattr, layer, name, own[name])
        setattr(layer, name, value)


def _rates(values: dict[str, Any]) -> list[str]:
    return [name for name, value in values.items() if "drop" in name and isinstance(value, float)]
