"""Coupled components elimination: what goes in each of its iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lit_prune.allocation.plan import TOLERANCE, axes_of, uniform
from lit_prune.errors import UserError
from lit_prune.structure.counting import count
from lit_prune.structure.layout import Widths
from lit_prune.structure.model import Label

#: Heads that must go together and are more than this share of all go in several iterations' time.
_LARGE = 1 / 8
_HEADS = ("group", "query")
_AXES = (*_HEADS, "channel", "hidden")


@dataclass(frozen=True)
class Step:
    """What goes in one iteration.

    Attributes:
        removed: Units of each layer, by axis (of every group for `query`).
        features: Residual features.
    """

    removed: dict[str, list[int]]
    features: int = 0

    def applied(self, widths: Widths) -> Widths:
        """Sizes after the step."""
        left = widths.copy()
        left.shared["hidden"] -= self.features
        for axis, numbers in self.removed.items():
            for sizes, number in zip(left.layers, numbers, strict=True):
                sizes[axis] -= number
        return left


@dataclass(frozen=True)
class Course:
    """The iterations of a run.

    Attributes:
        steps: What goes in each; at least one.
        sparsity: Share of the parameters that is gone in the end.
    """

    steps: list[Step]
    sparsity: float


def plan_course(
    labels: Sequence[Label],
    widths: Widths,
    axes: Sequence[str],
    *,
    sparsity: float = 0.0,
    iterations: int | None = None,
    ffn_step: int | None = None,
    protected: Sequence[int] = (),
    decoder: bool = True,
    stock: bool = False,
) -> Course:
    """What goes in each iteration until a sparsity is reached, or in a number of iterations.

    An iteration takes a head of each layer, `ffn_step` channels of each layer, and as many residual
    features as a head has entries. Where heads share keys, one head of each of a layer's G groups
    goes at a time (or a whole group): then an iteration takes G times as much of everything; but if
    these are more than an eighth of the heads, one head falls due in each iteration and they go
    when G are due, while channels and features go as ever. Of the last iteration only what meets
    the sparsity goes: its heads first, then its features, then channels.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning", sections 3.3 and, for shared keys, 4.2.

    Args:
        labels: Labels of the model's parameters, each parameter once.
        widths: Sizes of its axes before the first iteration.
        axes: What goes: ``group`` or ``query``, ``channel``, ``hidden``.
        sparsity: Share of the parameters to remove, if there is no number of iterations.
        iterations: Their number, each in full as far as there are units.
        ffn_step: Channels; by default a layer's channels divided by its heads.
        protected: Layers that keep their heads and channels.
        decoder: Whether parameters of the decoder layers count, or all.
        stock: Whether every layer must lose as many channels as the others.

    Raises:
        UserError: An axis or layer is unknown, or the target is out of reach.
    """
    _check(widths, axes, sparsity, iterations, ffn_step, protected)
    pace = _Pace.of(widths, axes, ffn_step, protected)
    total = count(labels, widths, decoder=decoder)
    most = total - count(labels, pace.least(widths), decoder=decoder)
    goal = min(sparsity * total, most) if iterations is None else math.inf
    steps: list[Step] = []
    left, gone, last = widths, 0, False
    while not last and gone < min(goal, most) and (not iterations or len(steps) < iterations):
        step = pace.step(len(steps), left)
        last = gone + _weight(labels, left, step, decoder) >= goal
        if last:
            step = _shortened(labels, left, step, goal - gone, protected, decoder, stock)
        removes = _weight(labels, left, step, decoder)
        if removes or not last:
            steps.append(step)
        left, gone = step.applied(left), gone + removes
    if iterations is None and abs(gone / total - sparsity) > TOLERANCE:
        raise UserError(
            f"expected a sparsity that cutting {' and '.join(axes)} can reach, got {sparsity:g}; "
            f"the nearest is {gone / total:.3f} and the most is {most / total:.3f} of the "
            "parameters; choose that, or cut more axes"
        )
    return Course(steps or [Step({})], gone / total)


def _check(
    widths: Widths,
    axes: Sequence[str],
    sparsity: float,
    iterations: int | None,
    ffn_step: int | None,
    protected: Sequence[int],
) -> None:
    if not axes or set(axes) - set(_AXES) or set(_HEADS) <= set(axes):
        raise UserError(
            f"expected axes out of {', '.join(_AXES)}, and only one of the first two, got "
            f"{', '.join(axes) or 'none'}"
        )
    if not 0 <= sparsity < 1 or any(n is not None and n < 1 for n in (iterations, ffn_step)):
        raise UserError(
            "expected a sparsity from 0 to below 1, and iterations and ffn_step of at least 1, got "
            f"{sparsity:g}, {iterations} and {ffn_step}"
        )
    number = len(widths.layers)
    for layer in protected:
        if not 0 <= layer < number:
            raise UserError(f"expected protected layers from 0 to {number - 1}, got {layer}")
    if len(set(protected)) == number and "hidden" not in axes:
        raise UserError(f"expected a layer that may be cut, got all {number} protected")


@dataclass(frozen=True)
class _Pace:
    """What a full iteration takes.

    Attributes:
        heads: The axis that heads go by, if they do.
        together: Heads that go at a time.
        rate: Heads that fall due in an iteration.
        channels: Channels of each layer for each of them, None if they stay.
        features: Features for each of them.
        protected: Layers that keep their heads and channels.
    """

    heads: str | None
    together: int
    rate: int
    channels: list[int] | None
    features: int
    protected: Sequence[int]

    @classmethod
    def of(
        cls, widths: Widths, axes: Sequence[str], ffn_step: int | None, protected: Sequence[int]
    ) -> _Pace:
        """The pace for a model."""
        heads = next((axis for axis in _HEADS if axis in axes), None)
        free = [sizes for i, sizes in enumerate(widths.layers) if i not in protected]
        sizes = (free or widths.layers)[0]
        together = {"group": sizes["query"], "query": sizes["group"]}.get(heads or "", 1)
        large = together > _LARGE * sizes["group"] * sizes["query"]
        rate = 1 if large and len(axes) > 1 else together
        channels = None
        if "channel" in axes:
            channels = [
                ffn_step or max(round(x["channel"] / (x["group"] * x["query"])), 1)
                for x in widths.layers
            ]
        features = widths.shared["head_dim"] if "hidden" in axes else 0
        return cls(heads, together, rate, channels, features, protected)

    def step(self, number: int, left: Widths) -> Step:
        """What goes in an iteration, as far as there are units; one of each stays.

        Args:
            number: Iterations before it.
            left: What they left.
        """
        removed: dict[str, list[int]] = {}
        if self.heads is not None:
            due = [n * self.rate // self.together for n in (number, number + 1)]
            removed[self.heads] = self._taken(
                left, self.heads, [due[1] - due[0]] * len(left.layers)
            )
        if self.channels is not None:
            removed["channel"] = self._taken(
                left, "channel", [self.rate * n for n in self.channels]
            )
        return Step(removed, min(self.rate * self.features, left.shared["hidden"] - 1))

    def _taken(self, left: Widths, axis: str, numbers: Sequence[int]) -> list[int]:
        return [
            0 if layer in self.protected else min(number, sizes[axis] - 1)
            for layer, (number, sizes) in enumerate(zip(numbers, left.layers, strict=True))
        ]

    def least(self, widths: Widths) -> Widths:
        """Sizes when all is gone that can go."""
        axes = [*([self.heads] if self.heads else []), *(["channel"] if self.channels else [])]
        everything = {
            axis: self._taken(widths, axis, [sizes[axis] for sizes in widths.layers])
            for axis in axes
        }
        return Step(everything, widths.shared["hidden"] - 1 if self.features else 0).applied(widths)


def _weight(labels: Sequence[Label], left: Widths, step: Step, decoder: bool) -> int:
    """Parameters that go with a step."""
    return count(labels, left, decoder=decoder) - count(labels, step.applied(left), decoder=decoder)


def _shortened(
    labels: Sequence[Label],
    left: Widths,
    step: Step,
    goal: float,
    protected: Sequence[int],
    decoder: bool,
    stock: bool,
) -> Step:
    """As much of a step as meets a number of parameters: heads, then features, then channels."""

    def weight(part: Step) -> int:
        return _weight(labels, left, part, decoder)

    heads = {axis: numbers for axis, numbers in step.removed.items() if axis != "channel"}
    none = {axis: [0] * len(numbers) for axis, numbers in heads.items()}
    parts = []
    for removed in (heads, none):
        few, many = 0, step.features
        while few < many:  # the most features that don't exceed the goal
            middle = (few + many + 1) // 2
            few, many = (
                (few, middle - 1) if weight(Step(removed, middle)) > goal else (middle, many)
            )
        parts += [Step(removed, few), Step(removed, min(few + 1, step.features))]
    if "channel" not in step.removed:
        return min(parts, key=lambda part: abs(weight(part) - goal))
    part = next((part for part in parts if weight(part) <= goal), parts[2])
    after = part.applied(left)
    (channels,) = axes_of(labels, after, ["channel"], protected)
    rest = min(goal - weight(part), channels.weight(channels.units))
    share = rest / count(labels, after, decoder=True)
    if not any(channels.units):
        return part
    plan = uniform(labels, after, share, ["channel"], protected=protected, stock=stock)
    return Step({**part.removed, **plan.removed}, part.features)
