"""The size of what a unit owns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_prune.structure.coupling import per_unit


def magnitude(units: Mapping[str, Tensor], norm: Literal["l1", "l2"] = "l2") -> Tensor:
    """Score units by the norm of all their weights and biases, whatever structure they are in.

    l1: sum |w|; l2: sqrt(sum w²). It ranks as LLM-Pruner's magnitude, sum |w|^p, does.

    Source: "LLM-Pruner: On the Structural Pruning of Large Language Models", magnitude criteria.

    Args:
        units: What each unit owns of each role, [units, entries] or [groups, units, entries].
        norm: Which norm.

    Returns:
        [units] or [groups, units], float32; the lowest go first.
    """
    order = 1 if norm == "l1" else 2
    parts = [torch.linalg.vector_norm(x, order, -1, dtype=torch.float32) for x in units.values()]
    return torch.linalg.vector_norm(torch.stack(parts), order, 0)


def kernel_norms(rows: Mapping[str, Tensor], axis: str) -> Tensor:
    """Sum of the L2 norms of the kernels that a unit owns: rows of Q, columns of O, and so on.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning", "the sum of L2 values of the kernels", the baseline of its Table 4.

    Args:
        rows: As of `lit_prune.structure.coupling.view`.
        axis: ``channel``, ``group`` or ``query``.

    Returns:
        [units] or [groups, units], float32; the lowest go first.
    """
    kernels = {
        role: torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        for role, x in rows.items()
    }
    parts = [x.sum(-1) for x in per_unit(kernels, axis).values()]
    return torch.stack(parts).sum(0)


def feature_norms(rows: Mapping[str, Tensor], features: int) -> Tensor:
    """Sum over a layer's matrices of the L2 norm of what meets each residual feature.

    Source: as of `kernel_norms`.

    Args:
        rows: As of `lit_prune.structure.coupling.view`.
        features: Residual features; a bias that is appended to a row is none.

    Returns:
        [features], float32.
    """
    parts = [x[..., :features].flatten(0, -2) for x in rows.values()]
    norms = [torch.linalg.vector_norm(x, dim=0, dtype=torch.float32) for x in parts]
    return torch.stack(norms).sum(0)
