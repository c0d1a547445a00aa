"""Models in which some query heads, channels and residual features contribute little."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.planted import HEAD, plain_model

GROUPS, QUERIES, CHANNELS, HIDDEN = 3, 3, 24, 36
#: Planted channels of each layer and features of the model; one query head of every group.
FEW_CHANNELS, FEW_FEATURES = 6, 9


@dataclass
class Planted:
    """A model, and what must go first.

    Attributes:
        model: The model.
        heads: Of each layer, the planted query head of every group.
        channels: Of each layer, the planted channels.
        features: The planted residual features.
    """

    model: Any
    heads: list[list[int]]
    channels: list[set[int]]
    features: set[int]

    def found(self, scores: dict[str, list[Tensor]]) -> bool:
        """Whether scores rank exactly the planted units lowest."""
        return (
            [x.argmin(1).tolist() for x in scores["query"]] == self.heads
            and [_lowest(x, FEW_CHANNELS) for x in scores["channel"]] == self.channels
            and _lowest(scores["hidden"][0], FEW_FEATURES) == self.features
        )


def _lowest(scores: Tensor, number: int) -> set[int]:
    return set(scores.argsort()[:number].tolist())


@torch.no_grad()
def plant(seed: int, *, one_sided: bool = False) -> Planted:
    """Scale what planted units read and write by 0.03 to 0.25.

    Args:
        seed: Fixes weights, positions and degrees.
        one_sided: Scale what heads and channels write by the square of that, and nothing else that
            they own.
    """
    model = plain_model(seed, GROUPS, QUERIES, CHANNELS, HIDDEN)
    draw = torch.Generator().manual_seed(seed + 7)

    def degree(sides: int = 2) -> float:
        low, high = math.log(0.03), math.log(0.25)
        drawn = float(torch.rand(1, generator=draw)) * (high - low) + low
        return math.exp(drawn * 2 / sides)

    found = Planted(model, [], [], set(torch.randperm(HIDDEN, generator=draw)[:9].tolist()))
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found.heads.append(torch.randint(QUERIES, (GROUPS,), generator=draw).tolist())
        for group, query in enumerate(found.heads[-1]):
            first, own = (group * QUERIES + query) * HEAD, degree(2 - one_sided)
            attention.o_proj.weight[:, first : first + HEAD] *= own
            if not one_sided:
                attention.q_proj.weight[first : first + HEAD] *= own
        found.channels.append(set(torch.randperm(CHANNELS, generator=draw)[:6].tolist()))
        for channel in found.channels[-1]:
            own = degree(2 - one_sided)
            mlp.down_proj.weight[:, channel] *= own
            if not one_sided:
                mlp.gate_proj.weight[channel] *= own
                mlp.up_proj.weight[channel] *= own
    writers = {"o_proj", "down_proj"}
    for feature in found.features:
        own = degree()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                rows = parameter if name.split(".")[-2] in writers else parameter.T
                rows[feature] *= own
    return found
