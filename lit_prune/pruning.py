"""The callback that every pruning method is: how much goes, where, and what makes up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from lightning.pytorch import Trainer

from lit_prune.allocation.planning import check_target, free_share, planned, planned_by
from lit_prune.allocation.ranking import Scores, kept_units
from lit_prune.calibration.calibration import (
    Calibration,
    draw_batches,
    require_turns,
    with_smaller_batches,
)
from lit_prune.cutting import decision
from lit_prune.cutting.callback import CuttingCallback, sizes_of
from lit_prune.cutting.layerwise import (
    ColumnScore,
    Repair,
    Restoration,
    Ridge,
    by_columns,
    prune_layers,
)
from lit_prune.cutting.options import (
    Allocation,
    AxisName,
    RelativeTo,
    check_model,
    check_options,
    reported,
)
from lit_prune.fitting.ranks import ranks_of
from lit_prune.methods.smoothing import batch_by_batch
from lit_prune.prunable import Prunable
from lit_prune.reporting.distribution import Scored, histograms
from lit_prune.structure import Layout

#: Windows set aside for the `sensitivity` allocation, one for every so many calibration windows.
_HELD_SHARE = 4


class PruningCallback(CuttingCallback):
    """Prunes the module's model at the start of a fit or in the middle of it.

    A method is a subclass with a `score`, or with a `columns` where statistics of the inputs are
    all it needs; everything else is the same for all methods. To write one, name it in `method`,
    take your options and `**options: Any` in `__init__`, and hand the latter on.

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        axes: What is cut: FFN ``channel``s; of attention one of whole KV ``group``s, ``query``
            heads or ``value`` channels (the same number from each group); some methods cut
            ``hidden``, the residual stream's features.
        allocation: ``uniform`` takes the same share of every layer, ``global`` the lowest scores
            of the whole model (where heads and channels go: per parameter), ``sensitivity`` more
            from layers whose loss rises less when they alone are cut.
        restoration: What makes up for what goes: ``none``, ``least_squares`` on the kept columns,
            ``bias`` for the removed ones' mean output, or ``unit_scales`` on what stays of the
            blocks that are cut.
        samples: Calibration windows.
        length: Tokens of a calibration window.
        batch_size: Windows that go through the model at once.
        protected_layers: Layers that stay whole; the others give more.
        per_layer_ratio: Share that each layer gives that is not protected, instead of `sparsity`.
        relative_to: Whether the sparsity is of the ``decoder`` layers or of all parameters
            (``total``).
        multiple: Kept channels are a multiple of this in every layer that is cut; 0 for any number.
        start: Optimizer steps before the (first) cut.
        iterations: Number of cuts; each removes the same number of parameters.
        every: Optimizer steps between cuts; 0 makes them one after the other.
        ridge: What least squares shrinks towards: the kept ``weights``, or ``zero``.
        delta: Its ridge in units of the mean diagonal of the Gram matrix.
        smoothing: Score batch by batch, and multiply importance by its uncertainty over batches
            (see `lit_prune.methods.smoothing.Smoothing`), instead of one score of all batches.
        seed: Seed of whatever a method draws.
    """

    method = "pruning"
    #: What it can score.
    known_axes: ClassVar[tuple[str, ...]] = ("channel", "group", "query", "value")
    #: Whether a layer's scores are taken after the layers before it were cut.
    layerwise = False
    #: Whether `score` looks at a layer's weights only while `Calibration.layers` is at it.
    by_layer = False
    #: What `score` takes: ``batches``, also a single one; the ``data`` as a whole; or ``nothing``.
    looks_at: Literal["batches", "data", "nothing"] = "batches"
    #: Whether the ``bias`` restoration takes means of the dense model, not of the pruned one.
    dense_means: ClassVar[bool] = False
    #: Whether scores of heads and channels compare as they are, and may be below 0; else the
    #: ``global`` allocation compares scores per parameter.
    standardised: ClassVar[bool] = False
    #: Whether scores are natural logarithms of what reports show.
    logarithms: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float = 0.2,
        axes: Sequence[AxisName] = ("channel",),
        allocation: Allocation = "uniform",
        restoration: Repair = "none",
        samples: int = 32,
        length: int = 512,
        batch_size: int = 4,
        protected_layers: Sequence[int] = (),
        per_layer_ratio: float | None = None,
        relative_to: RelativeTo = "decoder",
        multiple: int = 0,
        start: int = 0,
        iterations: int = 1,
        every: int = 0,
        ridge: Ridge = "weights",
        delta: float = 1e-3,
        smoothing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(start, iterations, every)
        self.sparsity, self.axes, self.allocation = sparsity, tuple(axes), allocation
        self.samples, self.length, self.batch_size = samples, length, batch_size
        self.protected_layers, self.per_layer_ratio = list(protected_layers), per_layer_ratio
        self.relative_to, self.multiple, self.seed = relative_to, multiple, seed
        self.restoration = Restoration(restoration, ridge, delta)
        self.smoothing, self.stock = smoothing, False
        #: Histograms of the scores of the last cut.
        self.distributions: dict[str, Any] = {}
        check_options(self)

    # --- what a method is ----------------------------------------------------------------------

    def score(self, calibration: Calibration) -> Scores:
        """Score every unit of the axes; the lowest go first.

        Args:
            calibration: The model and its calibration tokens.
        """
        if self.columns is None:
            raise NotImplementedError(f"{type(self).__name__} has neither score nor columns")
        return decision.column_scores(calibration, self.columns)

    @property
    def columns(self) -> ColumnScore | None:
        """Scores columns from statistics of their inputs, for a method that needs no more."""
        return None

    def decide(self, calibration: Calibration, scores: Scores, target: float) -> Layout:
        """Which units stay.

        Args:
            calibration: The model and its calibration tokens.
            scores: What `score` gave.
            target: Share of the present decoder's parameters to remove.
        """
        if self.allocation == "global":
            plan = planned_by(self, calibration, scores, target)
        else:
            plan = planned(self, calibration, target, self._shares(calibration, scores, target))
        return kept_units(plan, scores, calibration.structure.widths)

    def apply(self, calibration: Calibration, layout: Layout) -> None:
        """Cut the model down to what stays, and restore it.

        Args:
            calibration: The model and its calibration tokens.
            layout: What stays.
        """
        decision.apply(calibration, layout, self.restoration, dense_means=self.dense_means)

    def options(self) -> dict[str, Any]:
        """What the method was asked for, as plain types, for reports."""
        return reported(self) | super().options()

    @classmethod
    def instead_of_sparsity(cls, options: Mapping[str, Any]) -> str | None:
        """The option that says how much goes in the place of `sparsity`, if one does.

        Args:
            options: Arguments for a callback, by name.
        """
        return None if options.get("per_layer_ratio") is None else "per_layer_ratio"

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at calibration tokens."""
        repaired, tried = self.restoration.kind != "none", self.allocation == "sensitivity"
        return self.looks_at != "nothing" or repaired or tried

    @property
    def scores_while_cutting(self) -> bool:
        """Whether each layer is scored when those before it were cut."""
        return self.layerwise and self.columns is not None and self.allocation != "global"

    def prepare(self, trainer: Trainer, pl_module: Prunable) -> None:
        """Check what was asked before anything is done, and get ready."""
        check_model(self, pl_module)
        self.stock = pl_module.stock
        if "hidden" not in self.axes:
            last = self.iterations - 1
            model = Calibration(pl_module.model, pl_module.structure, [], self.axes, iteration=last)
            check_target(self, model, self.target(pl_module, self.iterations))
        if self.needs_data:
            require_turns(trainer, self.iterations)
            if self.start:  # a mistake in the data shall not come to light after training
                self.draw(trainer)

    def goal(self, pl_module: Prunable) -> float:
        """Share of the decoder's original parameters to remove by the last cut."""
        if self.per_layer_ratio is not None:
            return self.per_layer_ratio * free_share(pl_module, self.protected_layers)
        if self.relative_to == "total":
            return self.sparsity * self.original["total"] / self.original["decoder"]
        return self.sparsity

    def target(self, pl_module: Prunable, iteration: int | None = None) -> float:
        """Share of the present decoder's parameters to remove by the end of a cut.

        Args:
            pl_module: The module.
            iteration: The cut, from 1; the next one by default.
        """
        part = (iteration or self.iteration + 1) / self.iterations
        goal = self.goal(pl_module) * self.original["decoder"] * part
        left = self.original["decoder"] - goal
        return min(max(1 - left / sizes_of(pl_module)["decoder"], 0.0), 1 - 1e-9)

    def cut(self, trainer: Trainer, pl_module: Any, drawn: list[Any]) -> Layout:
        """Prune once."""
        batches, held = drawn, self._held()
        own = slice(trainer.global_rank, None, trainer.world_size)
        calibration = Calibration(
            pl_module.model,
            pl_module.structure,
            batches[: len(batches) - held][own],
            self.axes,
            held=batches[len(batches) - held :][own],
            ranks=ranks_of(trainer.strategy),
            iteration=self.iteration,
            goal=self.goal(pl_module),
            seed=self.seed,
            title=self.method,
            shown=trainer.is_global_zero,
        )
        layout = self.prune(calibration, self.target(pl_module))
        pl_module.findings["scores"] = self.distributions
        return layout

    def prune(self, calibration: Calibration, target: float) -> Layout:
        """Score, decide, restore and cut, once.

        Args:
            calibration: The model, which is cut in place, and its calibration tokens.
            target: Share of the present decoder's parameters to remove.

        Returns:
            What stays, in the numbering of the model before.
        """
        if self.columns is None or not self.scores_while_cutting:
            score = partial(batch_by_batch, score=self.score) if self.smoothing else self.score
            scores, calibration = with_smaller_batches(calibration, score)
            layout = decision.agreed(calibration.ranks, self.decide(calibration, scores, target))
            scored = {axis: dict(enumerate(values)) for axis, values in scores.items()}
            self.distributions = histograms(scored, layout, logarithms=self.logarithms)
            self.apply(calibration, layout)
            return layout
        plan = planned(self, calibration, target, self._shares(calibration, self.columns, target))
        found: Scored = {}
        layout = prune_layers(
            calibration.model,
            calibration.structure,
            calibration.stream(),
            by_columns(calibration.structure, self.columns, plan, found),
            self.axes,
            restoration=self.restoration,
            dense=calibration.stream() if self.restoration.kind == "unit_scales" else None,
            ranks=calibration.ranks,
            track=calibration.track("layers", changes=True),
        )
        self.distributions = histograms(found, layout, logarithms=self.logarithms)
        return layout

    def _shares(
        self, calibration: Calibration, scores: Scores | ColumnScore, target: float
    ) -> list[float] | None:
        if self.allocation != "sensitivity":
            return None
        whole, how = self.protected_layers, self.restoration
        return decision.layer_shares(calibration, scores, target, whole, how)

    def _held(self) -> int:
        """Batches set aside."""
        whole = self.samples // self.batch_size
        return -(-whole // _HELD_SHARE) if self.allocation == "sensitivity" else 0

    def draw(self, trainer: Any) -> list[Any]:
        """Calibration batches of all processes, those set aside at the end.

        Raises:
            UserError: The data module has none, or too few.
        """
        if not self.needs_data:
            return []
        samples = self.samples + self._held() * self.batch_size
        return draw_batches(trainer, samples, self.length, self.batch_size, self.iteration)
