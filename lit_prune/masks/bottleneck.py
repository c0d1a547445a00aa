"""Masks with noise on KV groups, channels and residual features, learned with the weights frozen.

Source: "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted Inference",
section 3.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_prune.errors import UserError
from lit_prune.masks.adaptation import GATED, DecoderCount
from lit_prune.scores import vib
from lit_prune.structure.layout import Layout, Widths

#: An axis and the layer, or None for `hidden`, which all layers share.
Place = tuple[str, int | None]


class Gates(nn.Module):
    """A mean and a variance for each KV group, channel and residual feature.

    A KV group is one unit: all entries that its query heads write share its mu and sigma, and each
    entry of each token has noise of its own. In training mode a unit is multiplied by
    mu + sigma * eta, in eval mode by mu; within `holding` by what a cut would leave of it.

    They are built from plain numbers alone, so that a checkpoint's values find a place: `widths`,
    `axes` and `protected` must be the same; `seed` decides the initial values and the noise.

    Args:
        widths: Sizes of the model's axes.
        axes: Which of group, channel and hidden have masks.
        protected: Layers whose groups and channels have none.
        seed: Of the initial values and the noise.

    Raises:
        UserError: An axis can't have masks, or there is nothing to choose from.
    """

    #: The lowest validation loss so far, and mu and log sigma^2 then, [2, units].
    best_loss: Tensor
    best: Tensor

    def __init__(
        self, widths: Widths, axes: Sequence[str], protected: Sequence[int] = (), seed: int = 0
    ) -> None:
        super().__init__()
        if unknown := [axis for axis in axes if axis not in GATED]:
            raise UserError(f"expected axes out of {', '.join(GATED)}, got {unknown[0]!r}")
        self.widths, self.seed, self.protected = widths.copy(), seed, tuple(protected)
        self.axes = tuple(axis for axis in GATED if axis in axes)
        #: Number of units of each gated place, in the order of the parameters.
        self.sizes = _gated(widths, self.axes, protected)
        if not self.sizes:
            raise UserError(
                f"expected units to choose from, got none on {' and '.join(self.axes) or 'no axis'}"
                "; choose other axes, or protect fewer layers"
            )
        units = sum(self.sizes.values())
        generator = torch.Generator("cpu").manual_seed(seed)

        def drawn(mean: float) -> nn.Parameter:
            noise = torch.randn(units, generator=generator, dtype=torch.float32, device="cpu")
            return nn.Parameter(mean + 0.01 * noise)

        self.mu, self.log_variance = drawn(1.0), drawn(-9.0)
        #: lambda_1 and lambda_2.
        self.multipliers = nn.Parameter(self.mu.new_zeros(2))
        self.register_buffer("best_loss", self.mu.new_tensor(math.inf))
        self.register_buffer("best", torch.stack([self.mu.detach(), self.log_variance.detach()]))
        self._draw = (0, 0)
        self._held: tuple[Tensor, Tensor] | None = None
        self._means: dict[Place, Tensor] = {}
        self._deviations: dict[Place, Tensor] = {}
        self._keeps: dict[Place, Tensor] = {}

    @property
    def spec(self) -> dict[str, Any]:
        """The arguments beside the widths, as plain types: `Gates(widths, **spec)`."""
        return {"axes": list(self.axes), "protected": list(self.protected), "seed": self.seed}

    def log_alpha(self) -> Tensor:
        """The logarithm of alpha of every unit, [units]."""
        return vib.log_alpha(self.mu, self.log_variance)

    def split(self, values: Tensor) -> dict[Place, Tensor]:
        """A value per unit [units] as a tensor for each place."""
        return dict(zip(self.sizes, values.split(list(self.sizes.values())), strict=True))

    def unpacked(self, values: Tensor, fill: float) -> dict[str, list[Tensor]]:
        """A value per unit [units] as a tensor for each axis and layer, float32 on the CPU.

        Args:
            values: For example log alpha or mu.
            fill: The value of units without a mask: infinity for log alpha, 1 for mu.
        """
        parts = self.split(values.detach().float().cpu())
        result: dict[str, list[Tensor]] = {}
        for axis in self.axes:
            numbers = _numbers(self.widths, axis)
            result[axis] = [
                parts.get(
                    (axis, layer), torch.full((number,), fill, dtype=torch.float32, device="cpu")
                )
                for layer, number in numbers.items()
            ]
        return result

    def expected(self) -> dict[str, Tensor]:
        """Expected number of kept units: `group` and `channel` [layers], `hidden` []."""
        sums = {place: p.sum() for place, p in self.split(vib.soft_keep(self.log_alpha())).items()}
        result = {}
        for axis in GATED:
            numbers = [
                sums.get((axis, layer), self.mu.new_tensor(number))
                for layer, number in _numbers(self.widths, axis).items()
            ]
            result[axis] = numbers[0] if axis == "hidden" else torch.stack(numbers)
        return result

    def kl(self, weights: Mapping[str, float]) -> Tensor:
        """The weighted KL divergence of all units, []."""
        divergences = self.split(vib.kl_divergence(self.mu, self.log_variance))
        return torch.stack([weights[axis] * d.sum() for (axis, _), d in divergences.items()]).sum()

    def units(self) -> dict[str, int]:
        """Number of masked units of each axis, in all layers."""
        found = dict.fromkeys(axis for axis, _ in self.sizes)
        return {a: sum(n for (axis, _), n in self.sizes.items() if axis == a) for a in found}

    def reseed(self, rank: int, batch: int) -> None:
        """Choose the noise of the next forward pass; the same numbers give the same noise.

        Args:
            rank: This process.
            batch: The training batch's number, counted from the start of the run.
        """
        self._draw = (rank, batch)

    def noise_seed(self, number: int) -> int:
        """The seed of a multiplication's noise in this forward pass."""
        text = "/".join(map(str, (self.seed, *self._draw, number)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")

    @contextmanager
    def holding(self, layout: Layout, *, weighted: bool = True) -> Iterator[None]:
        """Within the context the gated model computes what the cut model will.

        Args:
            layout: What stays.
            weighted: Multiply kept units by mu, as the weight update does, else by 1.
        """
        keeps = []
        for (axis, layer), number in self.sizes.items():
            kept = layout.hidden if layer is None else layout.layers[layer].keep.get(axis)
            mask = torch.full((number,), float(kept is None), dtype=torch.float32, device="cpu")
            keeps.append(mask if kept is None else mask.index_fill(0, kept, 1.0))
        keep = torch.cat(keeps).to(self.mu)
        self._held = (keep * self.mu.detach() if weighted else keep, keep)
        try:
            yield
        finally:
            self._held = None

    def remember(self, loss: float) -> bool:
        """Keep the present masks if their loss is the lowest so far; returns whether it is."""
        if not loss < float(self.best_loss):
            return False
        self.best_loss.fill_(loss)
        self.best.copy_(torch.stack([self.mu.detach(), self.log_variance.detach()]))
        return True

    @torch.no_grad()
    def recall(self) -> None:
        """Put the masks of the lowest loss back, if any were kept."""
        if math.isfinite(float(self.best_loss)):
            self.mu.copy_(self.best[0])
            self.log_variance.copy_(self.best[1])

    def refresh(self) -> None:
        """Prepare a forward pass: what each place is multiplied by."""
        means, keep = self._held or (self.mu, vib.soft_keep(self.log_alpha()))
        sampled = self.training and self._held is None
        self._means, self._keeps = self.split(means), self.split(keep)
        self._deviations = self.split((self.log_variance / 2).exp()) if sampled else {}

    def mean(self, place: Place) -> Tensor:
        """What each unit of a place is multiplied by in this forward pass, [units]."""
        return self._means[place]

    def deviation(self, place: Place) -> Tensor | None:
        """The standard deviation of its noise, [units], or None without noise."""
        return self._deviations.get(place)

    def keep(self, place: Place) -> Tensor:
        """How far each unit of a place is kept in this forward pass, [units]."""
        return self._keeps[place]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gates:
        """Move, but keep float32, which sums of small steps need."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        return self


class Objective:
    """What mask training adds to the task's loss: the bottleneck's price and the sparsity's.

    Args:
        counted: The decoder's parameters.
        weights: What a unit's KL divergence weighs, for each axis; see `vib.kl_weights`.
        target: Share of the decoder's parameters to remove.
        steps: Optimizer steps of the mask training.
    """

    def __init__(
        self, counted: DecoderCount, weights: Mapping[str, float], target: float, steps: int
    ) -> None:
        self.counted, self.weights = counted, dict(weights)
        self.target, self.steps = target, steps

    def __call__(self, gates: Gates, step: int) -> dict[str, Tensor]:
        """The terms in an optimizer step.

        Args:
            gates: The gates.
            step: The step, from 0.

        Returns:
            `kl` and `penalty`, to be added to the loss, and the expected `sparsity`; each [].
        """
        sparsity = self.counted.sparsity(gates.expected())
        target = vib.target_at(step, self.steps, self.target)
        return {
            "kl": gates.kl(self.weights),
            "penalty": vib.sparsity_penalty(sparsity, target, *gates.multipliers),
            "sparsity": sparsity,
        }


def mask_optimizer(
    gates: Gates, rate: float, steps: int, mean_rate: float | None = None
) -> tuple[Optimizer, LambdaLR]:
    """AdamW down the loss for masks, with a linear decay, and up for multipliers, without.

    Args:
        gates: The gates.
        rate: The first learning rate of log sigma^2; that of the multipliers is 0.1.
        steps: Optimizer steps of the mask training.
        mean_rate: The first learning rate of mu; None is `rate`.
    """
    groups: list[dict[str, Any]] = [
        {"params": [gates.log_variance], "lr": rate},
        {"params": [gates.mu], "lr": rate if mean_rate is None else mean_rate},
        {"params": [gates.multipliers], "lr": 0.1, "maximize": True},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.0)

    def falling(step: int) -> float:
        return max(1 - step / steps, 0.0)

    return optimizer, LambdaLR(optimizer, [falling, falling, lambda step: 1.0])


def _numbers(widths: Widths, axis: str) -> dict[int | None, int]:
    """Units of an axis by layer, or by None for what all layers share."""
    if axis == "hidden":
        return {None: widths.shared["hidden"]}
    return {layer: sizes[axis] for layer, sizes in enumerate(widths.layers)}


def _gated(widths: Widths, axes: Sequence[str], protected: Sequence[int]) -> dict[Place, int]:
    return {
        (axis, layer): number
        for axis in axes
        for layer, number in _numbers(widths, axis).items()
        if number > 1 and layer not in protected
    }
