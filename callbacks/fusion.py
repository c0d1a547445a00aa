"""Adaptive fusion: a coarse and a fine Taylor estimate in one score, then unit tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Trainer

from lit_prune.allocation.protection import ends
from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.cutting.layerwise import Repair
from lit_prune.errors import UserError, require_one_of, require_unused
from lit_prune.methods.taylor import FisherScale, taylor_scores
from lit_prune.prunable import Prunable
from lit_prune.pruning import AxisName, PruningCallback
from lit_prune.scores.fusion import Mixing, fuse
from lit_prune.scores.taylor import Estimate, Weighting

FusionEstimate = Literal["fusion", "vector", "element1", "element2", "mixed"]

#: Layers at the start and the end of a model of 32 that the paper does not prune.
_FIRST, _LAST = 4, 2


class AdaptiveFusionPruning(PruningCallback):
    """Prunes heads and channels by a coarse and a fine Taylor estimate, sample by sample.

    Source: "Efficient Pruning of Large Language Model with Adaptive Estimation Fusion"; the
    formulas are in `lit_prune.scores.taylor` and `lit_prune.scores.fusion`. The paper's sparsity is
    that of each pruned layer: `per_layer_ratio`.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        estimate: ``fusion``, or one of the single estimates of the paper's tables.
        mixing: How coarse and fine are joined: their ``sum`` as in the paper, ``normalised`` by
            each layer's mean first, or weighed by ``depth``, fine early and coarse late.
        weighting: How much a sample counts: the same (``uniform``), or as its ``loss``.
        fisher_scale: Second-order terms as they are (``mean``), or times the ``tokens`` that a
            sample's loss is the mean of.
        axes: What is cut.
        restoration: As for `lit_prune.pruning.PruningCallback`; the paper's is ``unit_scales``,
            here of blocks that are cut only: those of protected layers stay as they are.
        samples: Calibration windows.
        length: Tokens of a calibration window.
        batch_size: Windows whose gradient is taken at once, as one sample.
        protected_layers: Layers that stay whole; by default the first 4 and the last 2 of 32, and
            the same share at other depths, or none under --stock.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "adaptive fusion"

    def __init__(
        self,
        sparsity: float = 0.2,
        estimate: FusionEstimate = "fusion",
        mixing: Mixing = "sum",
        weighting: Weighting = "uniform",
        fisher_scale: FisherScale = "mean",
        axes: Sequence[AxisName] = ("group", "channel"),
        restoration: Repair = "unit_scales",
        samples: int = 50,
        length: int = 128,
        batch_size: int = 1,
        protected_layers: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            axes=axes,
            restoration=restoration,
            samples=samples,
            length=length,
            batch_size=batch_size,
            protected_layers=protected_layers or (),
            **options,
        )
        require_one_of("estimate", estimate, FusionEstimate)
        require_one_of("mixing", mixing, Mixing)
        require_one_of("weighting", weighting, Weighting)
        require_one_of("fisher_scale", fisher_scale, FisherScale)
        if estimate != "fusion" and mixing != "sum":
            raise UserError(
                f"expected estimate fusion for mixing, which joins two estimates, got {estimate} "
                f"with {mixing}; leave out mixing or choose fusion"
            )
        if self.allocation == "global" and estimate == "fusion" and mixing != "sum":
            raise UserError(
                "expected mixing sum with the global allocation, since the others make scores "
                f"relative to their layer's mean, got {mixing}; choose one or the other"
            )
        if self.smoothing and weighting == "loss":
            raise UserError(
                "expected weighting uniform with smoothing, which scores each batch alone, so that "
                "no sample can count more than another, got loss; leave out one of the two"
            )
        if estimate in ("vector", "element1"):
            needed = "an estimate that has second-order terms"
            require_unused(AdaptiveFusionPruning, needed, fisher_scale=fisher_scale)
        self.estimates: tuple[Estimate, ...] = (
            ("coarse", "mixed") if estimate == "fusion" else (estimate,)
        )
        self.mixing: Mixing = mixing
        self.weighting: Weighting = weighting
        self.fisher_scale: FisherScale = fisher_scale
        self.protects_ends = protected_layers is None

    def prepare(self, trainer: Trainer, pl_module: Prunable) -> None:
        """Check what was asked before anything is done, and get ready."""
        if self.protects_ends:
            layers = len(pl_module.structure.widths.layers)
            # all layers have one width under --stock
            self.protected_layers = [] if pl_module.stock else ends(layers, _FIRST, _LAST)
        super().prepare(trainer, pl_module)

    def score(self, calibration: Calibration) -> Scores:
        """The estimates of each unit, joined.

        Args:
            calibration: The model and its calibration tokens.
        """
        found = taylor_scores(
            calibration.model,
            calibration.structure,
            calibration.batches,
            self.estimates,
            calibration.axes,
            weighting=self.weighting,
            fisher_scale=self.fisher_scale,
            reduce=calibration.ranks.reduce,
            track=calibration.track("gradients"),
        )
        if len(self.estimates) == 1:
            return found[self.estimates[0]]
        return fuse(found["coarse"], found["mixed"], self.mixing)

    def options(self) -> dict[str, Any]:
        """What the method was asked for, as plain types, for reports."""
        own: dict[str, Any] = {"weighting": self.weighting}
        if self.estimates != ("vector",) and self.estimates != ("element1",):
            own["fisher_scale"] = self.fisher_scale  # which first-order terms have not
        if len(self.estimates) == 1:
            return super().options() | {"estimate": self.estimates[0]} | own
        return super().options() | {"estimate": "fusion", "mixing": self.mixing} | own
