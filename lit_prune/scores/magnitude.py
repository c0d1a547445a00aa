"""The size of what a unit owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def magnitude(units: Mapping[str, Tensor], norm: Literal["l1", "l2"] = "l2") -> Tensor:
    """Score units by the norm of all their weights and biases, whatever structure they are in.

    l1: sum |w|; l2: sqrt(sum w²). It ranks as LLM-Pruner's magnitude, sum |w|^p, does.

    Source: the baseline "L2" of "Structured Pruning for Large Language Models Using Coupled
    Components Elimination and Minor Fine-tuning", on the same groups; "LLM-Pruner: On the
    Structural Pruning of Large Language Models", magnitude criteria.

    Args:
        units: What each unit owns of each role, [units, entries] or [groups, units, entries].
        norm: Which norm.

    Returns:
        [units] or [groups, units], float32; the lowest go first.
    """
    order = 1 if norm == "l1" else 2
    parts = [torch.linalg.vector_norm(x, order, -1, dtype=torch.float32) for x in units.values()]
    return torch.linalg.vector_norm(torch.stack(parts), order, 0)
