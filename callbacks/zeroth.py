"""MINI-LLM: feature-map sensitivity with gradients from forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch import Tensor

from lit_prune.allocation.protection import ends
from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.errors import UserError, require_one_of, require_unused
from lit_prune.gradients.spsa import GateNoise, Noise, WeightNoise, loss_slopes, windows
from lit_prune.methods.zeroth_order import (
    backprop_scores,
    batches_of,
    feature_map_scores,
    gate_scores,
    input_statistics,
    scored_parts,
    together,
)
from lit_prune.prunable import Prunable
from lit_prune.pruning import AxisName, PruningCallback
from lit_prune.scores.feature_map import BY_GRADIENT, BY_NORMS, Criterion
from lit_prune.scores.random import seed_of
from lit_prune.structure.coupling import parameter_names

Gradient = Literal["zeroth_order", "backprop"]
Perturb = Literal["weights", "gates"]


class ZerothOrderPruning(PruningCallback):
    """Ranks units by weights, activations and zeroth-order gradients; needs only forward passes.

    Source: "MINI-LLM: Memory-Efficient Structured Pruning for Large Language Models",
    feature map sensitivity. Its ablations are options.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        axes: What is cut.
        criterion: What an entry's sensitivity is: ``fms``, the product of weight, input norm and
            gradient; ``wanda``, without the gradient; ``gradient``, without the norm;
            ``magnitude``, the weight alone.
        gradient: ``zeroth_order`` estimates it from losses of perturbed weights, ``backprop``
            computes it.
        perturb: ``weights``, or ``gates``: one for each unit, far fewer (our own, untested).
        gradient_samples: Windows for the gradient, the first of the calibration windows;
            back-propagated `batch_size` at a time.
        epsilon: Size of the perturbation; null for 1e-3, or 1e-2 with gates.
        samples: Calibration windows, for the norms.
        protected_layers: Layers that stay whole; null for the paper's, the first 4 and the last 3
            of 32, or the same share at other depths; none under --stock.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "MINI-LLM"
    looks_at = "data"  # the first windows of all have the gradient

    def __init__(
        self,
        sparsity: float = 0.2,
        axes: Sequence[AxisName] = ("group", "channel"),
        criterion: Criterion = "fms",
        gradient: Gradient = "zeroth_order",
        perturb: Perturb = "weights",
        gradient_samples: int = 10,
        epsilon: float | None = None,
        samples: int = 128,
        protected_layers: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            axes=axes,
            samples=samples,
            protected_layers=protected_layers or (),
            **options,
        )
        require_one_of("criterion", criterion, Criterion)
        require_one_of("gradient", gradient, Gradient)
        require_one_of("perturb", perturb, Perturb)
        if perturb == "gates" and (criterion != "fms" or gradient != "zeroth_order"):
            raise UserError(
                "expected criterion fms and gradient zeroth_order where gates are perturbed, got "
                f"{criterion} and {gradient}; leave out perturb or the others"
            )
        default = 1e-3 if perturb == "weights" else 1e-2
        self.epsilon = default if epsilon is None else epsilon
        if gradient_samples < 1 or not self.epsilon > 0:
            raise UserError(
                "expected gradient_samples of at least 1 and an epsilon above 0, got "
                f"{gradient_samples} and {self.epsilon:g}"
            )
        self.criterion: Criterion = criterion
        if criterion == "magnitude":
            self.looks_at = "nothing"
        self._check_unused(gradient, gradient_samples, epsilon)
        if self._by_gradient and gradient_samples > samples:
            raise UserError(
                "expected gradient_samples out of the samples, got "
                f"{gradient_samples} of {samples}; lower one or raise the other"
            )
        self.gradient, self.perturb, self.gradient_samples = gradient, perturb, gradient_samples
        self._protect = protected_layers is None
        self._share = (0, 1)

    def _check_unused(self, gradient: Gradient, samples: int, epsilon: float | None) -> None:
        kind = ZerothOrderPruning
        if not self._by_gradient:
            asked = {"gradient": gradient, "gradient_samples": samples, "epsilon": epsilon}
            require_unused(kind, "criterion fms or gradient", **asked)
        if gradient != "zeroth_order":
            require_unused(kind, "gradient zeroth_order", epsilon=epsilon)

    def prepare(self, trainer: Trainer, pl_module: Prunable) -> None:
        """Check what was asked, and find out which windows are this process'."""
        if self._protect:
            layers = len(pl_module.structure.widths.layers)
            # all layers have one width under --stock
            self.protected_layers = [] if pl_module.stock else ends(layers, first=4, last=3)
        self._share = (trainer.global_rank, trainer.world_size)
        super().prepare(trainer, pl_module)

    def score(self, calibration: Calibration) -> Scores:
        """Feature-map sensitivity of each unit.

        Args:
            calibration: The model and its calibration tokens.
        """
        place = (calibration.model, calibration.structure, calibration.axes)
        statistics = self._statistics(calibration) if self.criterion in BY_NORMS else None
        if not self._by_gradient:
            return feature_map_scores(*place, statistics, None, self.criterion)
        rank, world = self._share
        count = self.gradient_samples
        own = windows(calibration.batches, count, self.batch_size, rank=rank, world=world)
        if self.gradient == "backprop":
            device, reduce = calibration.model.device, calibration.ranks.reduce
            whole = together(own, count, self.length, device, reduce)
            # as many at once as memory turned out to hold
            size = max((len(x["input_ids"]) for x in calibration.batches), default=self.batch_size)
            parts = batches_of(whole, size)
            track = calibration.track("gradients")
            return backprop_scores(*place, statistics, parts, self.criterion, track=track)
        seed = seed_of(calibration.seed, calibration.iteration)
        if self.perturb == "gates" and statistics is not None:
            gates = GateNoise(*place, seed)
            slopes = self._slopes(calibration, own, gates, count)
            return gate_scores(*place, statistics, gates, slopes)
        owned = [part for layer in scored_parts(*place) for part in layer]
        names = parameter_names(calibration.model, owned)
        weights = WeightNoise(calibration.model, names, seed)
        slopes = self._slopes(calibration, own, weights, count)
        return feature_map_scores(
            *place, statistics, lambda name: weights.gradient(name, slopes), self.criterion
        )

    def _statistics(self, calibration: Calibration) -> dict[str, InputStatistics]:
        layers = scored_parts(calibration.model, calibration.structure, calibration.axes)
        found = input_statistics(
            calibration.model,
            calibration.batches,
            [part.path for layer in layers for part in layer],
            track=calibration.track("norms"),
        )
        for statistics in found.values():
            statistics.reduce(calibration.ranks.reduce)
        return found

    def _slopes(self, calibration: Calibration, own: list[Any], noise: Noise, count: int) -> Tensor:
        slopes = loss_slopes(
            calibration.model,
            own,
            noise,
            count,
            self.epsilon,
            track=calibration.track("perturbations"),
        )
        return calibration.ranks.reduce(slopes)

    def options(self) -> dict[str, Any]:
        """What was asked for, for reports."""
        own = {"criterion": self.criterion}
        if self._by_gradient:
            own |= {"gradient": self.gradient, "gradient_samples": self.gradient_samples}
        if self._by_gradient and self.gradient == "zeroth_order":
            own |= {"perturb": self.perturb, "epsilon": self.epsilon}
        return super().options() | own

    @property
    def _by_gradient(self) -> bool:
        return self.criterion in BY_GRADIENT
