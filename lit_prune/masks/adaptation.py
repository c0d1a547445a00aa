"""From learned masks to what stays: the exact target, and dimensions that fit a GPU's tiles.

Source: "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted Inference",
section 3.2.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_prune.allocation.plan import TOLERANCE
from lit_prune.errors import UserError
from lit_prune.structure.counting import count
from lit_prune.structure.layout import LayerUnits, Layout, Widths
from lit_prune.structure.model import Label

#: Where units are divided: where the target is met, or at log alpha = 0.
Threshold = Literal["exact", "zero"]

#: The axes that have masks.
GATED = ("group", "channel", "hidden")

#: A value per unit of each axis: a tensor [units] for each layer, one [hidden] for `hidden`.
Units = Mapping[str, Sequence[Tensor]]


class DecoderCount:
    """Decoder parameters as a polynomial in the kept units of the gated axes.

    It equals `count(labels, widths, decoder=True)`, which loops over all labels, and takes a few
    tensor operations, so that a training step can differentiate it.

    Args:
        labels: Labels of the model's parameters, each parameter once. No axis may stand twice in
            a parameter.
        widths: Present sizes of its axes.
    """

    def __init__(self, labels: Sequence[Label], widths: Widths) -> None:
        self.widths = widths
        self._subsets = list(itertools.product((0, 1), repeat=len(GATED)))
        own: list[list[Label]] = [[] for _ in widths.layers]
        for label in labels:
            if label.layer is not None:
                own[label.layer].append(label)
        values = [[_at(layer, widths, i, s) for s in self._subsets] for i, layer in enumerate(own)]
        shape = (len(own), *[2] * len(GATED))
        cube = torch.tensor(values, dtype=torch.float64, device="cpu").view(shape)
        for place in range(1, len(shape)):  # f = f(0) + x (f(1) - f(0)) in each variable
            low, high = cube.unbind(place)
            cube = torch.stack([low, high - low], place)
        self.coefficients = cube.flatten(1)
        self.total = int(self(self.full()))

    def full(self) -> dict[str, Tensor]:
        """The kept units when all are kept, as `__call__` takes them; float64."""
        like = {"dtype": torch.float64, "device": "cpu"}
        kept = {
            axis: torch.tensor([sizes[axis] for sizes in self.widths.layers], **like)
            for axis in ("group", "channel")
        }
        return {**kept, "hidden": torch.tensor(self.widths.shared["hidden"], **like)}

    def __call__(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Parameters of the decoder layers.

        Args:
            kept: Kept units: `group` and `channel` [layers], `hidden` [].

        Returns:
            [], which can be differentiated by the numbers.
        """
        one = torch.ones_like(kept[GATED[0]])
        powers = [(one, kept[axis] * one) for axis in GATED]
        terms = [
            math.prod([power[i] for power, i in zip(powers, subset, strict=True)], start=one)
            for subset in self._subsets
        ]
        return (torch.stack(terms, 1) * self.coefficients.to(one)).sum()

    def sparsity(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Share of the decoder's parameters that goes, []; see `__call__`."""
        return 1 - self(kept) / self.total


def _at(labels: Sequence[Label], widths: Widths, layer: int, subset: Sequence[int]) -> int:
    """Parameters of a layer that has one unit or none of each gated axis."""
    sizes = Widths(dict(widths.shared), [dict(sizes) for sizes in widths.layers])
    for axis, number in zip(GATED, subset, strict=True):
        (sizes.shared if axis == "hidden" else sizes.layers[layer])[axis] = number
    return count(labels, sizes)


@dataclass(frozen=True)
class Decision:
    """What stays.

    Attributes:
        layout: The units that stay.
        sparsity: Share of the decoder's parameters that goes.
        before: That share before dimension adaptation.
    """

    layout: Layout
    sparsity: float
    before: float


def decide(
    ratios: Units,
    counted: DecoderCount,
    target: float,
    *,
    threshold: Threshold = "exact",
    multiple: int = 128,
    stock: bool = False,
) -> Decision:
    """Choose the units that stay: those above a threshold, then rounded to multiples.

    First a threshold on log alpha over all units removes the target's share of the decoder's
    parameters; with a multiple T the number n of residual features becomes floor((n + T/2) / T) T,
    at least T and the original number if T or the result exceeds it (equation 3). With that fixed,
    the threshold is found again over groups and channels, and then every layer's channels are
    rounded in the same way. The units with the highest log alpha stay. At least one group and one
    channel stay in each layer, and one multiple of residual features.

    Args:
        ratios: log alpha of each unit; infinite for units that have no mask.
        counted: The decoder's parameters.
        target: Share of them to remove.
        threshold: ``exact`` finds it by bisection; ``zero`` keeps what has log alpha > 0.
        multiple: T, or 0 to leave dimension adaptation out.
        stock: Remove the same number from every layer: a unit counts by the mean over the layers
            of the units of its rank. Channels and features then make up for groups' coarseness.

    Raises:
        UserError: The masks are not finite, or the target is out of reach.
    """
    ranked = _ranked(ratios, multiple, stock)
    most = float(counted.sparsity(_kept(_above(ranked, math.inf), counted)))
    if threshold == "exact" and most + TOLERANCE < target:
        raise UserError(
            f"expected a sparsity that cutting {' and '.join(ranked)} can reach, got {target:g}; "
            f"the most is {most:.3f} of the decoder's parameters; choose that, or cut more axes"
        )

    def chosen(free: Units) -> dict[str, list[Tensor]]:
        keep = _above(free, 0.0 if threshold == "zero" else _level(free, counted, target))
        if stock and threshold == "exact" and "group" in keep:  # a group in each layer is coarse
            free = _settled(free, "group", keep["group"])
            keep = _above(free, _level(free, counted, target))
        return keep

    keep = chosen(ranked)
    before = float(counted.sparsity(_kept(keep, counted)))
    if multiple and "hidden" in keep:
        features = _rounded(ranked["hidden"], keep["hidden"], multiple)
        keep = chosen(_settled(ranked, "hidden", features))
    if multiple and "channel" in keep:
        keep["channel"] = _rounded(ranked["channel"], keep["channel"], multiple)
    sparsity = float(counted.sparsity(_kept(keep, counted)))
    return Decision(_layout(keep, counted.widths), sparsity, before)


def _ranked(ratios: Units, multiple: int, stock: bool) -> dict[str, list[Tensor]]:
    """Log alpha, the same by rank in all layers under --stock; infinite for units that must stay.

    Raises:
        UserError: One is no number.
    """
    found = {axis: list(values) for axis, values in ratios.items()}
    for values in itertools.chain.from_iterable(found.values()):
        if values.isnan().any():
            raise UserError(
                "expected finite masks, got NaN; the mask training diverged, lower its learning "
                "rate"
            )
    if stock:
        found = {axis: _same_by_rank(values) for axis, values in found.items()}
    for axis, values in found.items():
        least = max(multiple, 1) if axis == "hidden" else 1
        found[axis] = [value.masked_fill(_top(value, least), math.inf) for value in values]
    return found


def _above(ratios: Units, level: float) -> dict[str, list[Tensor]]:
    """Where log alpha is above a threshold or has none: booleans [units]."""
    return {
        axis: [(values > level) | (values == math.inf) for values in ratios[axis]]
        for axis in ratios
    }


def _settled(ratios: Units, axis: str, keep: Sequence[Tensor]) -> Units:
    """The same with an axis decided."""
    return {**ratios, axis: [torch.where(stays, math.inf, -math.inf) for stays in keep]}


def _same_by_rank(values: list[Tensor]) -> list[Tensor]:
    orders = [value.argsort(descending=True, stable=True) for value in values]
    mean = torch.stack([value[order] for value, order in zip(values, orders, strict=True)]).mean(0)
    return [mean[order.argsort()] for order in orders]


def _top(values: Tensor, number: int) -> Tensor:
    """Where the highest are, [units] of booleans."""
    order = values.argsort(descending=True, stable=True)
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[order[:number]] = True
    return mask


def _rounded(ratios: Sequence[Tensor], keep: Sequence[Tensor], multiple: int) -> list[Tensor]:
    result = []
    for values, stays in zip(ratios, keep, strict=True):
        number = (int(stays.sum()) + multiple // 2) // multiple * multiple
        masked = values.isfinite().any()  # a protected layer's size stays what it is
        result.append(_top(values, max(number, multiple)) if masked else stays)
    return result


def _kept(keep: Units, counted: DecoderCount) -> dict[str, Tensor]:
    kept = counted.full()
    for axis, masks in keep.items():
        numbers = torch.stack([mask.sum() for mask in masks]).double()
        kept[axis] = numbers[0] if axis == "hidden" else numbers
    return kept


def _level(free: Units, counted: DecoderCount, target: float) -> float:
    """The threshold whose removal comes nearest to the target; -inf if that is none."""
    found = torch.cat([value for values in free.values() for value in values]).unique()
    levels = [-math.inf, *found[found.isfinite()].tolist()]

    def removed(place: int) -> float:
        return float(counted.sparsity(_kept(_above(free, levels[place]), counted)))

    place = bisect_left(range(len(levels) - 1), target, key=removed)
    if place and target - removed(place - 1) <= removed(place) - target:
        place -= 1
    return levels[place]


def _layout(keep: Mapping[str, Sequence[Tensor]], widths: Widths) -> Layout:
    def indices(mask: Tensor) -> Tensor:
        return mask.nonzero().flatten()

    hidden = None
    if "hidden" in keep and not keep["hidden"][0].all():
        hidden = indices(keep["hidden"][0])
    layers = tuple(
        LayerUnits(
            layer,
            {
                axis: indices(keep[axis][layer])
                for axis in ("group", "channel")
                if axis in keep and not keep[axis][layer].all()
            },
        )
        for layer in range(len(widths.layers))
    )
    return Layout(widths.copy(), hidden, layers)
