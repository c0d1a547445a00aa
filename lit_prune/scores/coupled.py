"""Coupled components: a row of one matrix and a column of another that work as their product.

A component is C = x yᵀ, such as a row x of Q and the row y of K that it meets. Its importance is
that of C's entries (equation 6), and their gradient G belongs to no parameter. With a = ∂L/∂x and
b = ∂L/∂y, take the smallest G with G y = a and Gᵀ x = b; where these two contradict each other,
s is their mean. Then, with ∘ for products of entries::

    s = (x·a + y·b) / 2
    v = x∘x / ‖x‖²         u = x∘a - s v / 2
    z = y∘y / ‖y‖²         w = y∘b - s z / 2
    (G∘C)_ij = u_i z_j + v_i w_j,    Σ_ij (G∘C)_ij = s

so that a sum over rows, columns or all of C takes O(d), and no d by d matrix is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = Mapping[str, Tensor]

#: A factor whose squared norm is below this makes a component that does nothing.
_LEAST = 1e-12
#: Channels are taken in turns of about so many entries, so that no temporary outgrows a layer.
_ENTRIES = 1 << 20
#: The products of attention: a row of Q with one of K, a column of O with a row of V.
_PAIRS = (("query", "key"), ("output", "value"))


@dataclass(frozen=True)
class Products:
    """Components' entries times their gradients, as (G∘C)_ij = u_i z_j + v_i w_j.

    Attributes:
        first: Their sum s over each component, [..., components].
        u: [..., components, entries of x].
        v: [..., components, entries of x].
        w: [..., components, entries of y].
        z: [..., components, entries of y].
        slopes: The terms of first order x∘a and y∘b.
    """

    first: Tensor
    u: Tensor
    v: Tensor
    w: Tensor
    z: Tensor
    slopes: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Products:
        """The least-norm solution for components x yᵀ with gradients a and b of their factors.

        Args:
            x: [..., components, entries].
            y: [..., components, entries], perhaps of another length.
            a: ∂L/∂x.
            b: ∂L/∂y.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, y, a, b = (tensor.to(dtype) for tensor in (x, y, a, b))
        v, z = x.square(), y.square()
        sizes = v.sum(-1, keepdim=True), z.sum(-1, keepdim=True)
        alive = ((sizes[0] >= _LEAST) & (sizes[1] >= _LEAST)).to(dtype)
        v, z = v * (alive / sizes[0].clamp(min=_LEAST)), z * (alive / sizes[1].clamp(min=_LEAST))
        slopes = x * a * alive, y * b * alive
        first = (slopes[0].sum(-1, keepdim=True) + slopes[1].sum(-1, keepdim=True)) / 2
        u, w = slopes[0] - first / 2 * v, slopes[1] - first / 2 * z
        return cls(first.squeeze(-1), u, v, w, z, slopes)

    def importance(self) -> Tensor:
        """|s - ½ Σ_c (G_c c)²| of each component, [..., components]."""
        u, v, w, z = self.u, self.v, self.w, self.z
        second = u.square().sum(-1) * z.square().sum(-1) + v.square().sum(-1) * w.square().sum(-1)
        return (self.first - (second + 2 * (u * v).sum(-1) * (z * w).sum(-1)) / 2).abs()

    def feature_importance(self, features: int) -> Tensor:
        """|Σ - ½ Σ (·)²| over row f and column f of every component's G∘C, for each f.

        Args:
            features: Residual features; a bias that is appended to a row is none.

        Returns:
            [features], all components of the tensors in one sum.
        """
        u, v, w, z = self.u, self.v, self.w, self.z
        squares = _lines(u, v, w, z)[..., :features] + _lines(w, z, u, v)[..., :features]
        slopes = self.slopes[0][..., :features] + self.slopes[1][..., :features]
        return (slopes - squares / 2).flatten(0, -2).sum(0).abs()


def _lines(u: Tensor, v: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """Σ_j (u_f z_j + v_f w_j)² for each f."""
    size = z.square().sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    return u.square() * size[0] + v.square() * size[1] + 2 * u * v * (z * w).sum(-1, keepdim=True)


def component_scores(
    weights: Rows, gradients: Rows, axes: Sequence[str] = ("query", "channel", "hidden")
) -> dict[str, Tensor]:
    """Importance of a layer's coupled components.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning", equations 2 to 6 and 8.

    Args:
        weights: Rows by role as of `lit_prune.structure.coupling.view`, of a model in which each
            query head has keys and values of its own (see `lit_prune.methods.unshared`).
        gradients: The loss' gradients of them.
        axes: What shall be scored: ``group`` or ``query``, ``channel``, ``hidden``.

    Returns:
        ``head``: [heads, k + v], Q·K and then V·O components, for `group` and `query`;
        ``channel``: [channels], the sum of down·gate and down·up where there is a gate;
        ``hidden``: [features], this layer's attention alone, each product of each head with an
        absolute value of its own.

    Raises:
        ValueError: Several query heads share keys.
    """
    found: dict[str, Tensor] = {}
    heads, hidden = "group" in axes or "query" in axes, "hidden" in axes
    if heads or hidden:
        scores, features = _attention(weights, gradients, hidden=hidden)
        if heads:
            found["head"] = scores
        if hidden:
            found["hidden"] = features
    if "channel" in axes:
        found["channel"] = _channels(weights, gradients)
    return found


def _attention(weights: Rows, gradients: Rows, *, hidden: bool) -> tuple[Tensor, Tensor]:
    """Component scores [heads, k + v] and feature scores [features] of a layer's attention."""
    heads, shared = weights["query"].shape[:2]
    if shared != 1:
        raise ValueError(f"expected keys for each query head, got {shared} heads that share them")
    features = weights["output"].shape[-1]
    scores, total = [], torch.zeros(())
    for head in range(heads):  # so that temporaries are a head's size
        row = []
        for first, second in _PAIRS:
            products = Products.of(
                weights[first][head, 0],
                weights[second][head],
                gradients[first][head, 0],
                gradients[second][head],
            )
            row.append(products.importance())
            if hidden:
                part = products.feature_importance(features)
                total = total.to(part) + part
        scores.append(torch.cat(row))
    return torch.stack(scores), total


def _channels(weights: Rows, gradients: Rows) -> Tensor:
    """Scores of FFN channels, [channels]."""
    channels, width = weights["down"].shape
    step = max(_ENTRIES // width, 1)
    found = []
    for first in range(0, channels, step):
        part = slice(first, first + step)
        scores = torch.zeros(())
        for role in ("gate", "up"):
            if role in weights:
                products = Products.of(
                    weights["down"][part],
                    weights[role][part],
                    gradients["down"][part],
                    gradients[role][part],
                )
                scores = scores.to(products.first) + products.importance()
        found.append(scores)
    return torch.cat(found)


def head_scores(components: Tensor, groups: int, axis: str) -> Tensor:
    """Scores of heads: the sums over their components.

    Args:
        components: Scores of Q·K and V·O components, [heads, components].
        groups: KV groups that the heads belong to, equal numbers in order.
        axis: ``group`` or ``query``.

    Returns:
        [groups], or [groups, query heads].
    """
    scores = components.sum(-1).unflatten(0, (groups, -1))
    return scores.sum(-1) if axis == "group" else scores
