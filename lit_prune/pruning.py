"""The callback that every pruning method is: how much goes, where, and what makes up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import Trainer

from lit_prune import decision
from lit_prune.allocation import Plan, uniform
from lit_prune.calibrating import Calibration, draw_batches
from lit_prune.cutting import CuttingCallback, sizes_of
from lit_prune.errors import UserError, require_one_of
from lit_prune.layerwise import ColumnScore, Repair, Restoration, by_columns, prune_layers
from lit_prune.module import PrunableLM
from lit_prune.ranking import Scores, aligned, kept_units, ranked
from lit_prune.ranks import ranks_of
from lit_prune.structure import Layout
from lit_prune.structure.limits import require_axes, require_stock

AxisName = Literal["channel", "group", "query", "value", "hidden"]
Allocation = Literal["uniform", "global", "sensitivity"]

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
            of the whole model, ``sensitivity`` more from layers whose loss rises less when they
            alone are cut.
        restoration: What makes up for what goes: ``none``, ``least_squares`` on the kept columns,
            ``bias`` for the removed ones' mean output, or ``unit_scales``.
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
        seed: Seed of whatever a method draws.
    """

    method = "pruning"
    #: What it can score.
    known_axes: ClassVar[tuple[str, ...]] = ("channel", "group", "query", "value")
    #: Whether a layer's scores are taken after the layers before it were cut.
    layerwise = False

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
        relative_to: Literal["decoder", "total"] = "decoder",
        multiple: int = 0,
        start: int = 0,
        iterations: int = 1,
        every: int = 0,
        ridge: Literal["weights", "zero"] = "weights",
        delta: float = 1e-3,
        seed: int = 0,
    ) -> None:
        ratio = sparsity if per_layer_ratio is None else per_layer_ratio
        if not 0 <= ratio < 1:
            raise UserError(f"expected a sparsity from 0 to below 1, got {ratio:g}")
        if not delta > 0:
            raise UserError(f"expected a delta above 0, got {delta:g}")
        require_one_of(allocation, Allocation)
        require_one_of(restoration, Repair)
        least = {"multiple": 0, "seed": 0, "samples": 1, "length": 2, "batch_size": 1}
        given = (multiple, seed, samples, length, batch_size)
        for (name, bound), value in zip(least.items(), given, strict=True):
            if value < bound:
                raise UserError(f"expected {name} of at least {bound}, got {value}")
        unknown = [axis for axis in axes if axis not in self.known_axes]
        if unknown or not axes:
            raise UserError(
                f"expected axes out of {', '.join(self.known_axes)} for {self.method}, got "
                f"{unknown[0] if unknown else 'none'}; choose among those"
            )
        super().__init__(start, iterations, every)
        self.sparsity, self.axes, self.allocation = sparsity, tuple(axes), allocation
        self.samples, self.length, self.batch_size = samples, length, batch_size
        self.protected_layers, self.per_layer_ratio = list(protected_layers), per_layer_ratio
        self.relative_to, self.multiple, self.seed = relative_to, multiple, seed
        if allocation == "sensitivity" and samples % batch_size:
            raise UserError(
                "expected whole batches for the sensitivity allocation, which sets some aside, got "
                f"{samples} samples in batches of {batch_size}; make samples a multiple of it"
            )
        self.restoration = Restoration(restoration, ridge, delta)
        if restoration == "unit_scales" and "hidden" in self.axes:
            raise UserError(
                "expected another restoration where hidden is cut, got unit_scales, which compares "
                "with the dense stream; choose least_squares or none"
            )
        self.stock = False

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
        structure = calibration.structure
        if self.allocation != "global":
            plan = self.plan(calibration, target, self._shares(calibration, scores))
        else:
            plan = ranked(
                scores,
                calibration.labels,
                structure.widths,
                target,
                self.axes,
                protected=self.protected_layers,
            )
            plan = aligned(plan, calibration.labels, structure.widths, self.multiple)
        return kept_units(plan, scores, structure.widths)

    def apply(self, calibration: Calibration, layout: Layout) -> None:
        """Cut the model down to what stays, and restore it.

        Args:
            calibration: The model and its calibration tokens.
            layout: What stays.
        """
        decision.apply(calibration, layout, self.restoration)

    def options(self) -> dict[str, Any]:
        """What the method was asked for, as plain types, for reports."""
        found = {
            "axes": list(self.axes),
            "allocation": self.allocation,
            "restoration": self.restoration.kind,
            "calibration": f"{self.samples} x {self.length} tokens",
            "protected_layers": self.protected_layers,
        }
        if self.restoration.kind == "least_squares":
            found |= {"ridge": self.restoration.ridge, "delta": self.restoration.delta}
        if self.multiple:
            found["multiple"] = self.multiple
        return found | super().options()

    def prepare(self, trainer: Trainer, pl_module: PrunableLM) -> None:
        """Check what was asked before anything is done, and get ready."""
        structure, model_type = pl_module.structure, pl_module.model.config.model_type
        require_axes(model_type, structure.axes(), self.axes)
        if pl_module.stock:
            require_stock(model_type, structure.family, structure.widths, self.axes)
        if pl_module.stock and "hidden" in self.axes:
            raise UserError(
                "expected axes under --stock that any config can express, got 'hidden', whose size "
                "must often suit the number of heads; leave out --stock or the axis"
            )
        if pl_module.stock and self.allocation != "uniform":
            raise UserError(
                "expected the uniform allocation under --stock, since one config number holds the "
                f"width of all layers, got {self.allocation}; leave out one of the two"
            )
        self.stock = pl_module.stock
        calibration = Calibration(pl_module.model, pl_module.structure, [], self.axes)
        if "hidden" not in self.axes:
            self.plan(calibration, self.target(pl_module, self.iterations))

    def target(self, pl_module: PrunableLM, iteration: int | None = None) -> float:
        """Share of the present decoder's parameters to remove by the end of a cut.

        Args:
            pl_module: The module.
            iteration: The cut, from 1; the next one by default.
        """
        sparsity, present = self.sparsity, sizes_of(pl_module)["decoder"]
        if self.per_layer_ratio is not None:
            number = len(pl_module.structure.widths.layers)
            sparsity = self.per_layer_ratio * (number - len(self.protected_layers)) / number
        part = (iteration or self.iteration + 1) / self.iterations
        goal = sparsity * self.original[self.relative_to] * part
        left = self.original["decoder"] - goal
        return min(max(1 - left / present, 0.0), 1 - 1e-9)

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
            seed=self.seed,
            title=self.method,
            shown=trainer.is_global_zero,
        )
        return self.prune(calibration, self.target(pl_module))

    def prune(self, calibration: Calibration, target: float) -> Layout:
        """Score, decide, restore and cut, once.

        Args:
            calibration: The model, which is cut in place, and its calibration tokens.
            target: Share of the present decoder's parameters to remove.

        Returns:
            What stays, in the numbering of the model before.
        """
        if self.columns is None or not self.layerwise or self.allocation == "global":
            scores = self.score(calibration)
            layout = decision.agreed(calibration, self.decide(calibration, scores, target))
            self.apply(calibration, layout)
            return layout
        plan = self.plan(calibration, target, self._shares(calibration, self.columns))
        return prune_layers(
            calibration.model,
            calibration.structure,
            calibration.stream(),
            by_columns(calibration.structure, self.columns, plan),
            self.axes,
            restoration=self.restoration,
            dense=calibration.stream() if self.restoration.kind == "unit_scales" else None,
            ranks=calibration.ranks,
            track=calibration.track("layers"),
        )

    def plan(
        self, calibration: Calibration, target: float, shares: Sequence[float] | None = None
    ) -> Plan:
        """How many units go from each layer where scores do not decide that.

        Args:
            calibration: The model.
            target: Share of the present decoder's parameters to remove.
            shares: What each layer gives relative to the others.
        """
        widths = calibration.structure.widths
        plan = uniform(
            calibration.labels,
            widths,
            target,
            self.axes,
            protected=self.protected_layers,
            stock=self.stock,
            shares=shares,
        )
        return aligned(plan, calibration.labels, widths, self.multiple, same=self.stock)

    def _shares(self, calibration: Calibration, scores: Scores | ColumnScore) -> list[float] | None:
        if self.allocation != "sensitivity":
            return None
        return decision.layer_shares(calibration, scores, self.protected_layers, self.restoration)

    def _held(self) -> int:
        """Batches set aside."""
        whole = self.samples // self.batch_size
        return -(-whole // _HELD_SHARE) if self.allocation == "sensitivity" else 0

    def draw(self, trainer: Any) -> list[Any]:
        """Calibration batches of all processes, those set aside at the end.

        Raises:
            UserError: The data module has none, or too few.
        """
        samples = self.samples + self._held() * self.batch_size
        return draw_batches(trainer, samples, self.length, self.batch_size, self.iteration)
