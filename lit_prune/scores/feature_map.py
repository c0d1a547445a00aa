"""The feature-map sensitivity of MINI-LLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Criterion = Literal["fms", "wanda", "magnitude", "gradient"]
#: Criteria that look at norms of inputs, and those that look at gradients.
BY_NORMS: tuple[Criterion, ...] = ("fms", "wanda")
BY_GRADIENT: tuple[Criterion, ...] = ("fms", "gradient")


def sensitivity(
    weight: Tensor, norms: Tensor | None, gradient: Tensor | None, criterion: Criterion = "fms"
) -> Tensor:
    """Sensitivity of each entry of a matrix.

    With n the norm of the entry's input, ``fms`` is |W| n |g|, ``wanda`` |W| n, ``magnitude`` |W|
    and ``gradient`` |W| |g|.

    Source: "MINI-LLM: Memory-Efficient Structured Pruning for Large Language Models",
    feature map sensitivity, and the criteria that its ablations compare.

    Args:
        weight: W, [rows..., inputs].
        norms: Euclidean norm of each input over the calibration tokens, of a shape that broadcasts
            to the weight's. The input of a bias is 1. `magnitude` and `gradient` need none.
        gradient: g, of the weight's shape; `wanda` and `magnitude` need none.
        criterion: What is multiplied.

    Returns:
        The weight's shape, float32.

    Raises:
        ValueError: The criterion needs a gradient or norms, and there are none.
    """
    if criterion not in BY_GRADIENT:
        value = weight.float().abs()
    elif gradient is None:
        raise ValueError(f"expected a gradient for {criterion}, got none")
    else:
        value = gradient.float().abs().mul_(weight.abs())
    if criterion not in BY_NORMS:
        return value
    if norms is None:
        raise ValueError(f"expected norms for {criterion}, got none")
    return value.mul_(norms)


def coupled(rows: Mapping[str, Tensor], axis: str) -> Tensor:
    """Scores of units from their rows: the highest of the coupled structures, row by row.

    A head is then the sum over its rows. What the query heads of a KV group have of a row index is
    summed first, so that it can be compared with the one row of K or V that they share.

    Source: MINI-LLM, "the maximum sensitivity score of the structures" of a group, in the order of
    "LLM-Pruner: On the Structural Pruning of Large Language Models".

    Args:
        rows: Each row's sum of entries by role, with G KV groups of q query heads: ``query``
            [G, q, k], ``key`` [G, k], ``value`` [G, v], ``output`` [G, q, v] (columns of O),
            ``gate``, ``up`` and ``down`` (columns) [channels].
        axis: ``channel``, ``group``, ``query`` or ``value``.

    Returns:
        [units], or [groups, units] for `query` and `value`; the lowest go first.
    """
    if axis == "channel":
        return _highest([rows[role] for role in ("gate", "up", "down") if role in rows])
    if axis == "query":
        return _highest([rows["query"], rows["output"]]).sum(-1)
    if axis == "value":
        return _highest([rows["value"], rows["output"].sum(1)])
    own = [rows["query"].sum(1), rows["key"], rows["value"], rows["output"].sum(1)]
    return _highest(own).sum(-1)


def _highest(structures: list[Tensor]) -> Tensor:
    """Maximum by row index; where values were cut, the last rows of keys have no counterpart."""
    width = max(x.shape[-1] for x in structures)
    padded = [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in structures]
    return torch.stack(padded).amax(0)
