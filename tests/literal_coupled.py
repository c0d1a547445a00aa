"""Coupled components by their d by d matrices, in plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

Rows = dict[str, Tensor]


def matrix(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """G∘C of one component x yᵀ, [entries of x, entries of y]."""
    n, m = x @ x, y @ y
    if n < 1e-12 or m < 1e-12:
        return torch.zeros(len(x), len(y), dtype=x.dtype)
    s = (x @ a + y @ b) / 2
    gradient = torch.outer(a, y) / m + torch.outer(x, b) / n - s * torch.outer(x, y) / (n * m)
    return gradient * torch.outer(x, y)


def importance(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> float:
    """Equation 6."""
    terms = matrix(x, y, a, b)
    return abs(float(terms.sum() - 0.5 * terms.square().sum()))


def features(products: list[tuple[Tensor, Tensor, Tensor, Tensor]], number: int) -> Tensor:
    """Equation 8 for one product of one head: all its components x, y, a, b in one sum."""
    found = torch.zeros(number, dtype=torch.float64)
    for x, y, a, b in products:
        squares = matrix(x, y, a, b).square()
        alive = float(x @ x) >= 1e-12 and float(y @ y) >= 1e-12
        for f in range(number):
            found[f] += (float(x[f] * a[f]) + float(y[f] * b[f])) * alive
            found[f] -= 0.5 * float(squares[f].sum() + squares[:, f].sum())
    return found.abs()


def component_scores(weights: Rows, gradients: Rows) -> dict[str, Tensor]:
    """What `lit_prune.scores.coupled.component_scores` gives for all axes."""

    def four(first: str, second: str, head: int, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            weights[first][head, 0, i],
            weights[second][head, i],
            gradients[first][head, 0, i],
            gradients[second][head, i],
        )

    number = weights["down"].shape[1]
    heads, hidden = [], torch.zeros(number, dtype=torch.float64)
    for head in range(len(weights["query"])):
        row = []
        for first, second in (("query", "key"), ("output", "value")):
            found = [four(first, second, head, i) for i in range(weights[second].shape[1])]
            row += [importance(*one) for one in found]
            hidden += features(found, number)
        heads.append(row)
    channels = []
    for i in range(len(weights["down"])):
        channels.append(0.0)
        for role in ("gate", "up"):
            if role in weights:
                channels[-1] += importance(
                    weights["down"][i],
                    weights[role][i],
                    gradients["down"][i],
                    gradients[role][i],
                )
    return {
        "head": torch.tensor(heads, dtype=torch.float64),
        "channel": torch.tensor(channels, dtype=torch.float64),
        "hidden": hidden,
    }
