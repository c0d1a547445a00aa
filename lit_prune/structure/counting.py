"""Parameters and multiply-accumulates, exact for widths, differentiable for expected widths."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lit_prune.structure.layout import Widths
from lit_prune.structure.model import Label, Structure


def unique_labels(model: nn.Module, structure: Structure) -> list[Label]:
    """The labels of a model's parameters, each tied tensor once."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), name)
    first = set(owners.values())
    return [label for label in structure.labels(model) if label.name in first]


def count(labels: Iterable[Label], widths: Widths, *, decoder: bool = False) -> Any:
    """Number of parameters at given widths.

    Args:
        labels: Labels of a model, each parameter once.
        widths: Sizes of its axes, for the layers that the labels name; tensors are allowed.
        decoder: Count the decoder layers only.

    Returns:
        An integer, or a tensor [] that can be differentiated by the sizes.
    """
    total: Any = 0
    for label in labels:
        if decoder and label.layer is None:
            continue
        sizes = widths.sizes(label.layer)
        total = total + math.prod(dim.size(sizes) for dim in label.dims)
    return total


def count_actual(model: nn.Module, structure: Structure, *, decoder: bool = False) -> int:
    """Number of parameters that a model has, each tied tensor once."""
    module = structure.layers(model) if decoder else model
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(
    model: nn.Module, structure: Structure, widths: Widths, length: int | Sequence[int] = 0
) -> Any:
    """Multiply-accumulates of one token's forward pass.

    Attention pads values to the keys' width, so a narrower `value` saves nothing there.

    Args:
        model: A model of this structure; it only says which modules there are.
        structure: Its structure.
        widths: Sizes of its axes, with the structure's number of layers; tensors are allowed.
        length: Tokens in the context that attention looks at, in each layer where windows differ;
            0 leaves attention scores out.
    """
    seen = [length] * len(widths.layers) if isinstance(length, int) else length
    return linear_macs(model, structure, widths) + attention_macs(widths, seen)


def linear_macs(model: nn.Module, structure: Structure, widths: Widths) -> Any:
    """Multiply-accumulates of one token without attention; see `count_macs`."""
    total: Any = 0
    for site in structure.sites(model):
        module = model.get_submodule(site.path)
        if site.line.reads is not None and not isinstance(module, nn.Embedding):
            sizes = widths.sizes(site.layer)
            total = total + site.line.reads.size(sizes) * site.line.writes.size(sizes)
    return total


def attention_macs(widths: Widths, seen: Sequence[int]) -> Any:
    """Multiply-accumulates of attention's scores, and of mixing values by them.

    Args:
        widths: Sizes of a model's axes.
        seen: Tokens that attention looks at, in each layer; of several tokens their sum.
    """
    total: Any = 0
    for layer, tokens in enumerate(seen):
        sizes = widths.sizes(layer)
        total = total + tokens * sizes["group"] * sizes["query"] * 2 * sizes["head_dim"]
    return total
