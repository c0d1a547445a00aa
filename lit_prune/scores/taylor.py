"""Taylor estimates of what removing a unit does to the loss, from gradients of samples.

Removing weights is δw = -w, so that of sample n the loss changes by about -t + ½ t² with t = Σ g w
over what is removed, the Hessian being replaced by the Fisher information. The estimates differ in
what is summed before the absolute value, and in which terms they take. With r = Σ t over a row, of
the rows of gate, up, Q, K and V (with their biases) and the columns of down and O, averages over n
and c the scale of the second-order term::

    vector    | mean r |
    coarse    | mean (r - ½ c r²) |
    element1  Σ_row | mean t |
    element2  Σ_row ½ c mean t²
    mixed     Σ_row | mean (t - ½ c t²) |

A unit scores the sum over its rows: one absolute value for each, since first-order terms of down
and up are equal and one sum inside would count the unit twice.

Memory: the average stands outside of each term, so that one running sum is enough for both orders.
``vector``, ``coarse`` and ``element2`` need a number for each row; ``element1`` and ``mixed`` need
one for each entry, the size of the layer in float32, because of the absolute value: they are meant
for gradients that come layer by layer (see `lit_prune.gradients.layerwise`), where only one layer's
sums are alive at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_prune.allocation.ranking import Scores
from lit_prune.structure.coupling import ROLES

Rows = Mapping[str, Tensor]
Estimate = Literal["vector", "coarse", "element1", "element2", "mixed"]
ESTIMATES: tuple[Estimate, ...] = get_args(Estimate)
Reduction = Literal["sum", "max"]
Weighting = Literal["uniform", "loss"]
#: Estimates that need a running sum for each entry of a layer.
BY_ENTRY: tuple[Estimate, ...] = ("element1", "mixed")


def contribution(estimate: Estimate, products: Tensor, scale: float = 1.0) -> Tensor:
    """What one sample adds to the average of an estimate, before its absolute value.

    Source: "LLM-Pruner: On the Structural Pruning of Large Language Models", section 3.2, equations
    3 to 5 (``vector``, ``element1``, ``element2`` and ``mixed``); "Efficient Pruning of Large
    Language Model with Adaptive Estimation Fusion", equations 5 and 9 (``coarse``) and 6
    (``mixed``).

    Args:
        estimate: Which.
        products: The sample's gradient times the weight, [..., entries of a row].
        scale: c, what the second-order term is multiplied with.

    Returns:
        [...], or [..., entries] for ``element1`` and ``mixed``.

    Raises:
        ValueError: There is no such estimate.
    """
    if estimate == "element1":
        return products
    if estimate == "element2":
        return products.square().sum(-1) * (scale / 2)
    if estimate == "mixed":
        return products.addcmul(products, products, value=-scale / 2)
    rows = products.sum(-1)
    if estimate == "vector":
        return rows
    if estimate == "coarse":
        return rows - rows.square() * (scale / 2)
    raise ValueError(f"expected an estimate out of {', '.join(ESTIMATES)}, got {estimate!r}")


def row_scores(estimate: Estimate, mean: Tensor) -> Tensor:
    """The score of each row from the average of its contributions, [...]."""
    return mean.abs().sum(-1) if estimate in BY_ENTRY else mean.abs()


def unit_scores(rows: Rows, axis: str, reduction: Reduction = "sum") -> Tensor:
    """Join the scores of the rows that a unit owns.

    The maximum is taken over the rows of the same number in a head (of Q summed over the query
    heads of a KV group), then these are summed, as LLM-Pruner does.

    Source: "LLM-Pruner: On the Structural Pruning of Large Language Models", section 3.2, "Group
    Importance".

    Args:
        rows: Role -> scores of its rows: ``query`` [G, q, k], ``key`` [G, k], ``value`` [G, v],
            ``output`` [G, q, v]; ``gate``, ``up`` and ``down`` [channels].
        axis: ``channel``, ``group``, ``query`` or ``value``.
        reduction: Over roles.

    Returns:
        [units], or [groups, units] for `query` and `value`.
    """
    parts = []
    for role in ROLES[axis]:
        if role not in rows:
            continue
        part = rows[role]
        if axis != "query" and role in ("query", "output"):
            part = part.sum(1)
        parts.append(part.unsqueeze(-1) if axis in ("channel", "value") else part)
    if reduction == "sum":
        return torch.stack([part.sum(-1) for part in parts]).sum(0)
    longest = max(part.shape[-1] for part in parts)  # values may be narrower than keys
    padded = [pad(part, (0, longest - part.shape[-1])) for part in parts]
    return torch.stack(padded).amax(0).sum(-1)


class TaylorSums:
    """Running averages over samples, from which units are scored layer by layer.

    Args:
        estimates: Which estimates.
        axes: Axes whose units are scored.
        reduction: Over the structures of a unit.
        weighting: How much a sample counts: the same (``uniform``), or as its ``loss``.
        scales: Of each sample the scale of second-order terms; 1 by default.
        reduce: Sums a tensor over processes.
    """

    def __init__(
        self,
        estimates: Sequence[Estimate],
        axes: Sequence[str],
        *,
        reduction: Reduction = "sum",
        weighting: Weighting = "uniform",
        scales: Sequence[float] | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.estimates, self.axes, self.scales = estimates, axes, scales
        self.weighting, self.reduce = weighting, reduce
        self.reduction: Reduction = reduction
        self._sums: dict[tuple[int, Estimate, str], Tensor] = {}
        self._weights: dict[int, float] = {}
        self._scores: dict[tuple[int, Estimate, str], Tensor] = {}

    def fold(self, batch: int, loss: float, layer: int, weights: Rows, gradients: Rows) -> None:
        """Take in one sample's gradients of a layer.

        Args:
            batch: The sample's number.
            loss: Its loss.
            layer: The layer.
            weights: Role -> weights, as of `lit_prune.structure.coupling.view`.
            gradients: The same for the gradient of its mean loss.
        """
        weight = loss if self.weighting == "loss" else 1.0
        scale = 1.0 if self.scales is None else self.scales[batch]
        self._weights[layer] = self._weights.get(layer, 0.0) + weight
        for role, gradient in self._owned(gradients).items():
            products = gradient.float() * weights[role].float()
            for estimate in self.estimates:
                share = contribution(estimate, products, scale)
                total = self._sums.get((layer, estimate, role))
                if total is None:
                    self._sums[layer, estimate, role] = share * weight
                else:
                    total.add_(share, alpha=weight)

    def finish(self, layer: int, weights: Rows) -> None:
        """Score a layer of which all samples are in, and free its sums.

        Args:
            layer: The layer; with several processes, each must finish the same one.
            weights: As for `fold`; of a process without samples only their shapes matter.
        """
        device = next(iter(weights.values())).device
        own = torch.tensor(self._weights.pop(layer, 0.0), dtype=torch.float32, device=device)
        weight = float(self.reduce(own))
        for estimate in self.estimates:
            rows = {}
            for role, tensor in self._owned(weights).items():
                total = self._sums.pop((layer, estimate, role), None)
                if total is None:
                    total = torch.zeros_like(tensor, dtype=torch.float32)
                    total = contribution(estimate, total)
                rows[role] = row_scores(estimate, self.reduce(total).div_(weight))
                del total
            for axis in self.axes:
                units = unit_scores(rows, axis, self.reduction)
                self._scores[layer, estimate, axis] = units.float().cpu()

    def result(self) -> dict[Estimate, Scores]:
        """Scores of all layers by estimate."""
        layers = sorted({layer for layer, _, _ in self._scores})
        return {
            estimate: {
                axis: [self._scores[layer, estimate, axis] for layer in layers]
                for axis in self.axes
            }
            for estimate in self.estimates
        }

    def _owned(self, rows: Rows) -> dict[str, Tensor]:
        """Only what a unit of some axis owns."""
        roles = {role for axis in self.axes for role in ROLES[axis]}
        return {role: tensor for role, tensor in rows.items() if role in roles}
