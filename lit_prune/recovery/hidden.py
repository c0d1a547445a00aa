"""Distillation on hidden states: which layers match, what they give, and how far it is apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.recovery.distillation import hidden_mse
from lit_prune.structure import Layout


class HiddenStates:
    """Records what decoder layers give in the next forward pass, until it is taken.

    Args:
        layers: The layers, in order.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._states: dict[int, Tensor] = {}
        self._handles = [
            layer.register_forward_hook(partial(self._record, number))
            for number, layer in enumerate(layers)
        ]

    def _record(self, number: int, layer: nn.Module, args: Any, output: Any) -> None:
        self._states[number] = output[0] if isinstance(output, tuple) else output

    def close(self) -> None:
        """Record nothing any more."""
        for handle in self._handles:
            handle.remove()

    def take(self) -> list[Tensor]:
        """The outputs [batch, tokens, hidden] of the layers; nothing is recorded any more."""
        self.close()
        return [self._states[number] for number in range(len(self._handles))]


def matching_layers(layout: Layout, every: int = 1) -> list[tuple[int, int]]:
    """Numbers of layers that are left, and of the dense model's that they were.

    Args:
        layout: What is left of the dense model.
        every: 1 for all layers; k for the k-th, 2k-th and so on of those that are left.
    """
    pairs = [(number, unit.source) for number, unit in enumerate(layout.layers)]
    return pairs[every - 1 :: every]


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, layout: Layout
) -> Tensor:
    """Mean over layers of the squared difference of their outputs.

    Where residual features were cut, those that are left are compared.

    Args:
        student: [batch, tokens, kept] of each layer.
        teacher: [batch, tokens, hidden] of the matching layers.
        labels: Unshifted labels [batch, tokens], -100 = ignored.
        layout: What is left of the dense model.
    """
    losses = []
    for ours, dense in zip(student, teacher, strict=True):
        kept = dense if layout.hidden is None else dense[..., layout.hidden.to(dense.device)]
        losses.append(hidden_mse(ours, kept, labels))
    return torch.stack(losses).mean()
