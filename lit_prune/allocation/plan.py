"""How much goes where: a target sparsity turned into units to remove from each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.structure.counting import count
from lit_prune.structure.layout import Widths
from lit_prune.structure.model import Label

#: A target is refused if the nearest that can be reached is further away.
TOLERANCE = 0.02

#: The most that a layer gives where layers give different shares.
MOST = 0.92

#: Whole heads are coarse, so they are rounded first and channels make up the difference.
_ORDER = ("group", "query", "value", "channel")


@dataclass(frozen=True)
class Plan:
    """Units to remove.

    Attributes:
        removed: For each axis the number to remove from each layer (of every group for `query`).
        sparsity: Share of the decoder's parameters that goes.
    """

    removed: dict[str, list[int]]
    sparsity: float


@dataclass
class Axis:
    """An axis in every layer.

    Attributes:
        name: The axis.
        units: Units that can go from each layer; one stays.
        costs: Parameters that go with a unit of each layer.
    """

    name: str
    units: list[int]
    costs: list[int]

    def spread(self, ratios: Sequence[float]) -> list[int]:
        """Round a ratio of each layer's units, remainders evenly over the layers."""
        result, exact, taken = [], 0.0, 0
        for units, ratio in zip(self.units, ratios, strict=True):
            exact += ratio * (units + 1 if units else 0)
            removed = min(max(round(exact) - taken, 0), units)
            taken += removed
            result.append(removed)
        return result

    def weight(self, removed: Sequence[int]) -> int:
        """Parameters that go with some units."""
        return sum(n * cost for n, cost in zip(removed, self.costs, strict=True))

    def sizes(self) -> list[int]:
        """Parameters of all units of each layer, the last one included."""
        return [(n + 1 if n else 0) * c for n, c in zip(self.units, self.costs, strict=True)]


def uniform(
    labels: Sequence[Label],
    widths: Widths,
    sparsity: float,
    axes: Sequence[str],
    *,
    protected: Sequence[int] = (),
    stock: bool = False,
    shares: Sequence[float] | None = None,
) -> Plan:
    """Remove the same share of every layer's units so that the whole decoder meets a target.

    Args:
        labels: Labels of the model's parameters, each parameter once.
        widths: Present sizes of its axes.
        sparsity: Share of the decoder's parameters to remove, in [0, 1).
        axes: What may be cut.
        protected: Layers that stay whole; the others' share rises.
        stock: The same number from every layer, so that one config number can express it.
        shares: What each layer gives relative to the others, instead of the same; no more than
            0.92 of its units unless the target needs more.

    Raises:
        UserError: An axis or layer is unknown, or the target is out of reach.
    """
    check(widths, sparsity, axes, protected)
    if stock:
        _check_stock(widths, axes, protected)
        if shares is not None:
            raise UserError(
                "expected the same share of every layer under --stock, got shares that differ; "
                "choose the uniform allocation"
            )
    table = axes_of(labels, widths, axes, protected)
    total = count(labels, widths, decoder=True)
    most = sum(axis.weight(axis.units) for axis in table)
    remaining, removed = sparsity * total, {}
    for place, axis in enumerate(table):
        sizes = [
            sum(layer) for layer in zip(*(rest.sizes() for rest in table[place:]), strict=True)
        ]
        ratios = _ratios(remaining, sizes, shares)
        removed[axis.name] = _spread(axis, ratios, stock)
        if rest := table[place + 1 :]:
            least = remaining - sum(other.weight(other.units) for other in rest)
            _leave_room(axis, removed[axis.name], least, remaining, together=stock)
        elif not stock:
            _settle(axis, removed[axis.name], remaining)
        remaining -= axis.weight(removed[axis.name])
    reached = sparsity - remaining / total
    if abs(reached - sparsity) > TOLERANCE:
        raise UserError(
            f"expected a sparsity that cutting {' and '.join(axes)} can reach, got {sparsity:g}; "
            f"the nearest is {reached:.3f} and the most is {most / total:.3f} of the decoder's "
            f"parameters; choose that, or cut more axes"
        )
    return Plan(removed, reached)


def _spread(axis: Axis, ratios: Sequence[float], stock: bool) -> list[int]:
    """How many units of an axis go from each layer: under --stock the same from all."""
    if not stock:
        return axis.spread(ratios)
    return [min(round(ratios[0] * (axis.units[0] + 1)), axis.units[0])] * len(axis.units)


def require_reachable(
    labels: Sequence[Label],
    widths: Widths,
    sparsity: float,
    axes: Sequence[str],
    protected: Sequence[int] = (),
) -> None:
    """Refuse a target that no scores can reach; see `uniform` for the arguments.

    Raises:
        UserError: An axis or layer is unknown, or the target is out of reach.
    """
    check(widths, sparsity, axes, protected)
    total = count(labels, widths, decoder=True)
    most = sum(axis.weight(axis.units) for axis in axes_of(labels, widths, axes, protected)) / total
    if most + TOLERANCE < sparsity:
        raise UserError(
            f"expected a sparsity that cutting {' and '.join(axes)} can reach, got {sparsity:g}; "
            f"the most is {most:.3f} of the decoder's parameters; choose that, or cut more axes"
        )


def _ratios(goal: float, sizes: Sequence[int], shares: Sequence[float] | None) -> list[float]:
    """The ratio of each layer's parameters that goes, so that a number of them goes in all."""
    if shares is None:
        return [goal / max(sum(sizes), 1)] * len(sizes)
    low, high = 0.0, MOST / max(min((share for share in shares if share > 0), default=1.0), 1e-9)
    for _ in range(60):
        middle = (low + high) / 2
        going = sum(min(middle * s, MOST) * size for s, size in zip(shares, sizes, strict=True))
        low, high = (middle, high) if going < goal else (low, middle)
    return [min(high * share, MOST) for share in shares]


def check(widths: Widths, sparsity: float, axes: Sequence[str], protected: Sequence[int]) -> None:
    """Refuse a target that makes no sense for a model.

    Raises:
        UserError: The sparsity, an axis or a protected layer.
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"expected a sparsity from 0 to below 1, got {sparsity:g}")
    if not axes:
        raise UserError("expected at least one axis to cut, got none")
    for axis in axes:
        if axis not in _ORDER:
            raise UserError(f"expected axes out of {', '.join(_ORDER)}, got {axis!r}")
        if all(sizes[axis] == 1 for sizes in widths.layers):
            raise UserError(
                f"expected an axis with units to spare, got {axis!r}, of which each layer has one; "
                f"choose another, or channels alone"
            )
    if len(heads := [axis for axis in _ORDER[:-1] if axis in axes]) > 1:
        raise UserError(  # what a unit of one costs would depend on how many of another go
            f"expected at most one of {', '.join(_ORDER[:-1])}, got {' and '.join(heads)}; "
            f"choose one of them"
        )
    for layer in protected:
        if not 0 <= layer < len(widths.layers):
            raise UserError(
                f"expected protected layers from 0 to {len(widths.layers) - 1}, got {layer}"
            )


def _check_stock(widths: Widths, axes: Sequence[str], protected: Sequence[int]) -> None:
    if protected:
        raise UserError(
            "expected no protected layers under --stock, since one config number holds the width "
            f"of all layers, got {list(protected)}; leave out one of the two"
        )
    for axis in axes:
        if widths.uniform(axis) is None:
            found = [sizes[axis] for sizes in widths.layers]
            raise UserError(
                f"expected the same number of {axis} units in every layer under --stock, got "
                f"{min(found)} to {max(found)}; leave out --stock"
            )


def axes_of(
    labels: Sequence[Label], widths: Widths, axes: Sequence[str], protected: Sequence[int]
) -> list[Axis]:
    """Units and costs of some axes, heads before channels.

    Args:
        labels: Labels of the model's parameters, each parameter once.
        widths: Present sizes of its axes.
        axes: Which.
        protected: Layers that stay whole.
    """
    return [_axis(labels, widths, axis, protected) for axis in _ORDER if axis in axes]


def _axis(labels: Sequence[Label], widths: Widths, name: str, protected: Sequence[int]) -> Axis:
    units, costs = [], []
    for layer, sizes in enumerate(widths.layers):
        free = 0 if layer in protected else sizes[name] - 1
        less = widths.copy()
        less.layers[layer][name] -= 1
        own = [label for label in labels if label.layer == layer]
        units.append(free)
        costs.append(count(own, widths) - count(own, less))
    return Axis(name, units, costs)


def _settle(axis: Axis, removed: list[int], goal: float) -> None:
    """Move single units until the parameters that go are within half a unit of the goal."""
    while True:
        rest = goal - axis.weight(removed)
        step = 1 if rest > 0 else -1
        free = [
            layer
            for layer, cost in enumerate(axis.costs)
            if abs(rest) > cost / 2 and 0 <= removed[layer] + step <= axis.units[layer]
        ]
        if not free:
            return
        layer = max(free, key=lambda i: step * (axis.units[i] - removed[i]))
        removed[layer] += step


def _leave_room(
    axis: Axis, removed: list[int], least: float, most: float, *, together: bool
) -> None:
    """Move units until the axes that follow can make up the difference to the target."""
    for step in (-1, 1):
        while axis.weight(removed) > most if step < 0 else axis.weight(removed) < least:
            free = [i for i, n in enumerate(removed) if 0 <= n + step <= axis.units[i]]
            if not free:
                break
            if not together:
                free = [max(free, key=lambda i: step * (axis.units[i] - removed[i]))]
            for layer in free:
                removed[layer] += step


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Indices of the units that stay when those with the lowest scores go.

    Args:
        scores: [units], or [groups, units] to choose in each group alone.
        removed: How many go, from each group if there are groups.

    Returns:
        Ascending indices [kept] or [groups, kept].
    """
    order = scores.argsort(dim=-1, stable=True)
    return torch.sort(order[..., removed:], dim=-1).values
