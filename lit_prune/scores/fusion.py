"""Adaptive fusion of a coarse and a fine Taylor estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Mixing = Literal["sum", "normalised", "depth"]


def fuse(
    coarse: Mapping[str, Sequence[Tensor]],
    fine: Mapping[str, Sequence[Tensor]],
    mixing: Mixing = "sum",
) -> dict[str, list[Tensor]]:
    """Add the two estimates of each unit.

    Both are sums over a unit's rows with one absolute value each (``coarse`` and ``mixed`` of
    `lit_prune.scores.taylor`). With i the layer's number, n the number of layers and means over the
    units of an axis in a layer::

        sum         coarse + fine
        normalised  coarse / mean + fine / mean
        depth       λ coarse / mean + (1 - λ) fine / mean,  λ = i / (n - 1)

    In a plain sum the fine estimate exceeds the coarse one by about the root of the number of
    entries in a row. Normalised scores are for ranking within a layer: each layer's mean is the
    same.

    Source: "Efficient Pruning of Large Language Model with Adaptive Estimation Fusion", equations 7
    and 12 (``sum``); ``depth`` is that section's motivation, fine early and coarse late.

    Args:
        coarse: Axis -> scores of each layer's units.
        fine: The same of the other estimate.
        mixing: How they are joined.

    Returns:
        Axis -> scores of each layer's units.
    """
    return {
        axis: [
            _fuse(a, b, mixing, layer / max(len(layers) - 1, 1))
            for layer, (a, b) in enumerate(zip(layers, fine[axis], strict=True))
        ]
        for axis, layers in coarse.items()
    }


def _fuse(coarse: Tensor, fine: Tensor, mixing: Mixing, depth: float) -> Tensor:
    if mixing == "sum":
        return coarse + fine
    share = (depth, 1 - depth) if mixing == "depth" else (1.0, 1.0)
    return share[0] * _normalised(coarse) + share[1] * _normalised(fine)


def _normalised(scores: Tensor) -> Tensor:
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny)
