"""Where scores decide how much goes from which layer, and widths that suit the hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_prune.allocation.plan import TOLERANCE, Plan, axes_of, check, keep_highest
from lit_prune.errors import UserError
from lit_prune.structure.counting import count
from lit_prune.structure.layout import Layout, Widths
from lit_prune.structure.model import Label

#: For each axis a score for every unit of each layer, [units], or [groups, units] for `query` and
#: `value`; for `hidden` one tensor [hidden]. The lowest go first.
Scores = dict[str, list[Tensor]]


def ranked(
    scores: Scores,
    labels: Sequence[Label],
    widths: Widths,
    sparsity: float,
    axes: Sequence[str],
    *,
    protected: Sequence[int] = (),
    per_parameter: bool = False,
) -> Plan:
    """Remove the lowest scores of the whole model until a target is met.

    A unit that would overshoot the target by more than it brings it closer, or by too much, is
    passed by, with all of its layer and axis that score higher; smaller ones make up the rest.

    One unit of each axis stays in every layer. Where every group of a layer must lose as many, the
    lowest unit of each group goes in one step, by the mean of their scores.

    Args:
        scores: Of the axes, comparable over layers; also over axes, unless `per_parameter`.
        labels: Labels of the model's parameters, each parameter once.
        widths: Present sizes of its axes.
        sparsity: Share of the decoder's parameters to remove, in [0, 1).
        axes: What may be cut.
        protected: Layers that stay whole.
        per_parameter: Divide the scores of each step by the parameters that go with it. A sum over
            a unit's entries is larger the more it has, and only so heads compare with channels.

    Raises:
        UserError: An axis or layer is unknown, a score is not finite, or the target is out of
            reach.
    """
    check(widths, sparsity, axes, protected)
    table = axes_of(labels, widths, axes, protected)
    total = count(labels, widths, decoder=True)
    values, owners = [], []
    for axis in table:
        for layer, units in enumerate(axis.units):
            cost = axis.costs[layer] if per_parameter else None
            values.append(_steps(scores[axis.name][layer], axis.name, layer, cost)[:units])
            owners += [(axis, layer)] * units
    removed = {axis.name: [0] * len(widths.layers) for axis in table}
    goal, gone, passed = sparsity * total, 0, set()
    for place in torch.cat(values).argsort(stable=True).tolist():
        axis, layer = owners[place]
        cost = axis.costs[layer]
        over = gone + cost - goal
        if (axis.name, layer) in passed or over >= min(abs(gone - goal), TOLERANCE * total):
            passed.add((axis.name, layer))  # too large; smaller ones may still fit
            continue
        gone += cost
        removed[axis.name][layer] += 1
    reached = gone / total
    if abs(reached - sparsity) > TOLERANCE:
        raise UserError(
            f"expected a sparsity that cutting {' and '.join(axes)} can reach, got {sparsity:g}; "
            f"the nearest is {reached:.3f} of the decoder's parameters; choose that, or cut more "
            "axes"
        )
    return Plan(removed, reached)


def _steps(scores: Tensor, axis: str, layer: int, cost: int | None) -> Tensor:
    """Scores of a layer in the order in which its units go, [units], perhaps per parameter."""
    _require_finite(scores, axis, layer)
    values = scores.float().sort(dim=-1).values
    if cost is not None:
        return (values.sum(0) if values.dim() == 2 else values) / cost
    return values.mean(0) if values.dim() == 2 else values


def _require_finite(scores: Tensor, axis: str, layer: int) -> None:
    if not torch.isfinite(scores).all():
        raise UserError(
            f"expected finite scores, got NaN or infinity among those of {axis} in layer {layer}; "
            "check the model's weights, or use --model.dtype float32"
        )


def aligned(
    plan: Plan, labels: Sequence[Label], widths: Widths, multiple: int, *, same: bool = False
) -> Plan:
    """Round what stays of layers that lose channels to a multiple, what is over going to the next.

    A layer that loses none keeps its width, whatever it is; at least one multiple stays, or all
    channels if there are fewer.

    Args:
        plan: Units to remove.
        labels: Labels of the model's parameters, each parameter once.
        widths: Present sizes of its axes.
        multiple: Of which the widths shall be one; 0 and 1 leave the plan as it is.
        same: Round every layer alike.
    """
    if multiple < 2 or "channel" not in plan.removed:
        return plan
    removed, carry = [], 0
    for sizes, gone in zip(widths.layers, plan.removed["channel"], strict=True):
        if not gone:
            removed.append(0)
            continue
        wanted = sizes["channel"] - gone + carry
        kept = (wanted + multiple // 2) // multiple * multiple
        kept = min(max(kept, multiple), sizes["channel"])
        carry = 0 if same else wanted - kept
        removed.append(sizes["channel"] - kept)
    everything = {**plan.removed, "channel": removed}
    left = widths.copy()
    for axis, numbers in everything.items():
        for layer, number in zip(left.layers, numbers, strict=True):
            layer[axis] -= number
    total = count(labels, widths, decoder=True)
    return Plan(everything, 1 - count(labels, left, decoder=True) / total)


def require_near(plan: Plan, found: Plan, multiple: int, gone: float = 0.0) -> None:
    """Refuse widths in multiples that undo most of a plan.

    Args:
        plan: The plan.
        found: What `aligned` made of it.
        multiple: Of which the widths are one.
        gone: Share of the decoder's parameters that went before; the plans are of what is left.

    Raises:
        UserError: Less than half of what shall be gone would be gone.
    """
    wanted, reached = (1 - (1 - gone) * (1 - each.sparsity) for each in (plan, found))
    if wanted > 0 and reached < wanted / 2:
        raise UserError(
            f"expected a multiple that widths can be rounded to, got {multiple}, with which "
            f"{reached:.3f} of the decoder's parameters would go instead of {wanted:.3f}; choose a "
            "smaller multiple or a higher sparsity"
        )


def kept_units(plan: Plan, scores: Mapping[str, Sequence[Tensor]], widths: Widths) -> Layout:
    """The layout in which a plan's numbers of lowest units are gone.

    Raises:
        UserError: A score is not finite.
    """
    layout = Layout.full(widths)
    for layer in range(len(widths.layers)):
        keep = {}
        for axis, numbers in plan.removed.items():
            if numbers[layer]:
                _require_finite(scores[axis][layer], axis, layer)
                keep[axis] = keep_highest(scores[axis][layer], numbers[layer])
        layout = layout.replace_layer(layer, keep)
    return layout
