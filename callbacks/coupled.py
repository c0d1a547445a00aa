"""Coupled components elimination: heads, channels and residual features go in some iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal

from lightning.pytorch import Trainer

from lit_prune.allocation.plan import Plan, keep_highest
from lit_prune.allocation.ranking import Scores, kept_units
from lit_prune.calibration.calibration import Calibration
from lit_prune.cutting.decision import narrow_stream
from lit_prune.errors import UserError, require_one_of, require_unused
from lit_prune.gradients.lora import LoRA
from lit_prune.methods.coupled import coupled_scores, uncoupled_scores
from lit_prune.methods.elimination import Step, plan_course
from lit_prune.methods.smoothing import Smoothing
from lit_prune.prunable import Prunable
from lit_prune.pruning import AxisName, PruningCallback
from lit_prune.scores.random import random_scores, seed_of
from lit_prune.structure import Layout
from lit_prune.structure.counting import count, unique_labels
from lit_prune.structure.norms import NormRescale

Gradients = Literal["full", "lora"]
Criterion = Literal["components", "random", "l2"]

#: Iterations where each takes the same share; as many as the paper makes for its 20 %.
_ITERATIONS = 3


class CoupledComponentPruning(PruningCallback):
    """Ranks what works as products of two weights, evaluating anew in each iteration.

    An iteration takes a head and some channels of each layer and some residual features, until the
    sparsity is reached; see `lit_prune.methods.elimination.plan_course`. With another allocation
    than ``uniform``, a `per_layer_ratio` or a `multiple`, each takes the same share instead, of
    which ``hidden`` can't be part.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning".

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        axes: What is cut; ``query`` stands for whole heads where no heads share keys.
        iterations: Iterations in full, instead of a `sparsity`; by default as many as that takes.
        ffn_step: Channels that go from each layer with a head; by default channels / heads.
        criterion: What units are ranked by: coupled ``components``, or, as the baselines of the
            paper's Table 4 on the same units, numbers at ``random`` or ``l2`` norms.
        gradients: ``full`` ones of the weights, or the paper's estimate from ``lora`` factors.
        smoothing: Multiply importance by its uncertainty over sentences, instead of the mean.
        norm_rescale: What RMS norms do when features go; see `lit_prune.structure.norms.rescale`.
        samples: Sentences of an evaluation, redrawn in each iteration.
        length: Tokens of a sentence.
        batch_size: Sentences that are scored as one.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "CCE"
    known_axes = ("channel", "group", "query", "hidden")

    def __init__(
        self,
        sparsity: float = 0.2,
        axes: Sequence[AxisName] = ("query", "channel", "hidden"),
        iterations: int | None = None,
        ffn_step: int | None = None,
        criterion: Criterion = "components",
        gradients: Gradients = "full",
        smoothing: bool = True,
        norm_rescale: NormRescale = "calibrated",
        samples: int = 10,
        length: int = 64,
        batch_size: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            sparsity=sparsity,
            axes=axes,
            iterations=_ITERATIONS if iterations is None else iterations,
            samples=samples,
            length=length,
            batch_size=batch_size,
            **options,
        )
        require_one_of("criterion", criterion, Criterion)
        require_one_of("gradients", gradients, Gradients)
        require_one_of("norm_rescale", norm_rescale, NormRescale)
        self.criterion: Criterion = criterion
        if criterion != "components":
            own = {"gradients": gradients, "smoothing": smoothing}
            require_unused(CoupledComponentPruning, "the criterion components", **own)
            self.looks_at = "nothing"
        self.gradients, self.smooths_sentences = gradients, smoothing
        self.norm_rescale: NormRescale = norm_rescale
        self.full_iterations, self.ffn_step = iterations, ffn_step
        shares = self.allocation != "uniform" or self.per_layer_ratio is not None or self.multiple
        if shares and "hidden" in self.axes:
            raise UserError(
                "expected no other allocation than uniform, no per_layer_ratio and no multiple "
                f"where hidden is cut, got {self.allocation}, {self.per_layer_ratio} and "
                f"{self.multiple}; leave them out, or hidden"
            )
        if ffn_step is not None and (shares or "channel" not in self.axes):
            raise UserError(
                "expected ffn_step only where each iteration takes a head and some channels, got "
                f"{self.allocation}, {self.per_layer_ratio} and {self.multiple} as allocation, "
                f"per_layer_ratio and multiple, and axes {', '.join(self.axes)}; leave it out"
            )
        if "hidden" not in self.axes:
            require_unused(CoupledComponentPruning, "the axis hidden", norm_rescale=norm_rescale)
        #: What goes in each iteration; None where each takes the same share.
        self.steps: list[Step] | None = None if shares else []
        if not shares:
            self.iterations = 1  # until they are planned
        self._at_first = (self.axes, self.sparsity, self.iterations, self.steps)

    def restart(self) -> None:
        """Forget an earlier fit, and what was planned for its model."""
        super().restart()
        self.axes, self.sparsity, self.iterations, self.steps = self._at_first

    @classmethod
    def instead_of_sparsity(cls, options: Mapping[str, Any]) -> str | None:
        """The option that says how much goes in the place of `sparsity`, if one does.

        Args:
            options: Arguments for a callback, by name.
        """
        own = options.get("allocation", "uniform") == "uniform" and not options.get("multiple")
        if own and options.get("iterations") is not None:
            return "iterations"
        return super().instead_of_sparsity(options)

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at calibration tokens, as norms of cut features do, too."""
        measured = "hidden" in self.axes and self.norm_rescale == "calibrated"
        return super().needs_data or measured

    def prepare(self, trainer: Trainer, pl_module: Prunable) -> None:
        """Check what was asked before anything is done, and plan the iterations."""
        if all(sizes["query"] == 1 for sizes in pl_module.layout.of.layers):
            heads = ("group" if axis == "query" else axis for axis in self.axes)
            self.axes = tuple(dict.fromkeys(heads))
        if self.steps is not None and not self.iteration:
            course = plan_course(
                unique_labels(pl_module.model, pl_module.structure),
                pl_module.structure.widths,
                self.axes,
                sparsity=self.sparsity,
                iterations=self.full_iterations,
                ffn_step=self.ffn_step,
                protected=self.protected_layers,
                decoder=self.relative_to == "decoder",
                stock=pl_module.stock,
            )
            self.steps, self.iterations = course.steps, len(course.steps)
            if self.full_iterations is not None:
                self.sparsity = course.sparsity
            if 0 <= trainer.max_steps < self.last_step:
                raise self._too_short(trainer.max_steps, "; leave out --no-recovery, if it is set")
        super().prepare(trainer, pl_module)

    def goal(self, pl_module: Prunable) -> float:
        """Share of the decoder's original parameters to remove by the last cut."""
        if self.relative_to == "total" and self.steps and "hidden" in self.axes:
            # features take parameters out of embeddings, too: only the plan knows how many
            labels, dense = unique_labels(pl_module.model, pl_module.structure), pl_module.layout.of
            left = reduce(lambda widths, step: step.applied(widths), self.steps, dense)
            return 1 - count(labels, left, decoder=True) / count(labels, dense, decoder=True)
        return super().goal(pl_module)

    def score(self, calibration: Calibration) -> Scores:
        """Score heads, channels and features by their coupled components, or a baseline's."""
        model, structure = calibration.model, calibration.structure
        seed = seed_of(calibration.seed, calibration.iteration)
        if self.criterion == "random":
            return random_scores(structure.widths, calibration.axes, seed)
        if self.criterion == "l2":
            return uncoupled_scores(model, structure, calibration.axes)
        lora = LoRA(seed=seed)
        return coupled_scores(
            model,
            structure,
            calibration.batches,
            calibration.axes,
            Smoothing(self.smooths_sentences),
            lora=lora if self.gradients == "lora" else None,
            ranks=calibration.ranks,
            track=calibration.track("sentences"),
        )

    def decide(self, calibration: Calibration, scores: Scores, target: float) -> Layout:
        """Take the lowest scores of each layer, as many as the iteration's step says."""
        if self.steps is None:
            return super().decide(calibration, scores, target)
        step, widths = self.steps[calibration.iteration], calibration.structure.widths
        layout = kept_units(Plan(step.removed, target), scores, widths)
        hidden = keep_highest(scores["hidden"][0], step.features) if step.features else None
        return Layout(layout.of, hidden, layout.layers)

    def apply(self, calibration: Calibration, layout: Layout) -> None:
        """Cut features first, with the norms' energies measured before that, then all else."""
        layout = narrow_stream(calibration, layout, self.norm_rescale)
        super().apply(calibration, layout)

    def options(self) -> dict[str, Any]:
        """What was asked for, as plain types."""
        own: dict[str, Any] = {"criterion": self.criterion}
        if self.criterion == "components":
            own |= {"gradients": self.gradients, "smoothing": self.smooths_sentences}
        found = super().options() | own
        if self.ffn_step is not None:
            found["ffn_step"] = self.ffn_step
        if "hidden" in self.axes:
            found["norm_rescale"] = self.norm_rescale
        return found

    def state_dict(self) -> dict[str, Any]:
        """How far it is, and what will go."""
        steps = self.steps and [{"removed": s.removed, "features": s.features} for s in self.steps]
        return super().state_dict() | {"steps": steps, "sparsity": self.sparsity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        if self.iteration and self.steps is not None:
            self.steps = [Step(**step) for step in state_dict["steps"]]
            self.iterations, self.sparsity = len(self.steps), state_dict["sparsity"]
