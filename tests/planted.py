"""Models in which some units, at random positions, contribute little, each in its own degree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lit_prune.structure import Layout
from tests.structure.tiny import tiny_model

#: A quarter of each is planted, so that one ratio takes just those.
GROUPS, CHANNELS, HIDDEN, HEAD = 4, 24, 32, 8


@dataclass
class Planted:
    """A model, and what must go first.

    Attributes:
        model: The model.
        weak: axis -> for each layer the planted units, weakest first.
    """

    model: Any
    weak: dict[str, list[list[int]]]


def plain_model(seed: int, groups: int, queries: int, channels: int, hidden: int) -> Any:
    """A tiny Llama without biases, with heads of 8 features."""
    return tiny_model(
        "llama",
        seed=seed,
        attention_bias=False,
        mlp_bias=False,
        hidden_size=hidden,
        intermediate_size=channels,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=HEAD,
    )


def planted(seed: int, queries: int = 1, axes: tuple[str, ...] = ("group", "channel")) -> Planted:
    """Scale all that a planted unit owns by 0.03 to 0.25.

    Args:
        seed: Fixes weights, positions and degrees.
        queries: Query heads of a KV group.
        axes: What is planted.
    """
    model = plain_model(seed, GROUPS, queries, CHANNELS, HIDDEN)
    generator = torch.Generator().manual_seed(seed + 100)
    weak: dict[str, list[list[int]]] = {axis: [] for axis in axes}
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for axis in axes:
            number = GROUPS if axis == "group" else CHANNELS
            units = torch.randperm(number, generator=generator)[: number // 4].tolist()
            low, high = math.log(0.03), math.log(0.25)
            degrees = torch.rand(len(units), generator=generator) * (high - low) + low
            order = degrees.argsort().tolist()
            weak[axis].append([units[i] for i in order])
            for unit, degree in zip(units, degrees.exp().tolist(), strict=True):
                own = slice(unit * HEAD, (unit + 1) * HEAD)
                heads = slice(unit * HEAD * queries, (unit + 1) * HEAD * queries)
                parts = [
                    (mlp.gate_proj.weight, unit),
                    (mlp.up_proj.weight, unit),
                    (mlp.down_proj.weight.T, unit),
                ]
                if axis == "group":
                    parts = [
                        (attention.q_proj.weight, heads),
                        (attention.k_proj.weight, own),
                        (attention.v_proj.weight, own),
                        (attention.o_proj.weight.T, heads),
                    ]
                with torch.no_grad():
                    for weight, rows in parts:
                        weight[rows] *= degree
    return Planted(model, weak)


def share(model: Any, axes: tuple[str, ...] = ("group", "channel")) -> float:
    """The part of the decoder's parameters that planted units are."""
    layer = model.model.layers[0]
    own = {
        "group": [getattr(layer.self_attn, f"{x}_proj").weight.numel() for x in "qkvo"],
        "channel": [getattr(layer.mlp, f"{x}_proj").weight.numel() for x in ("gate", "up", "down")],
    }
    total = sum(parameter.numel() for parameter in layer.parameters())
    return sum(sum(own[axis]) for axis in axes) / 4 / total


def removed_units(layout: Layout, axis: str) -> list[list[int]]:
    """The units of an axis that are gone from each layer."""
    gone = []
    for sizes, unit in zip(layout.of.layers, layout.layers, strict=True):
        kept = unit.keep[axis].tolist() if axis in unit.keep else range(sizes[axis])
        gone.append(sorted(set(range(sizes[axis])) - set(kept)))
    return gone
