"""TVA-Prune: masks with noise, trained for some steps, decide what goes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_prune.allocation.plan import uniform
from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.cutting.decision import narrow_stream
from lit_prune.errors import UserError, require_unused
from lit_prune.fitting.ranks import ranks_of
from lit_prune.fitting.refit import whole
from lit_prune.masks.adaptation import GATED, DecoderCount, Threshold
from lit_prune.masks.bottleneck import Gates, Objective, mask_optimizer
from lit_prune.masks.gating import GatedNorms
from lit_prune.masks.masking import Adaptation, MaskTraining, check_options
from lit_prune.prunable import Prunable
from lit_prune.pruning import AxisName, PruningCallback
from lit_prune.recovery.distillation import LossTerm, cross_entropy
from lit_prune.scores import vib
from lit_prune.structure import Layout
from lit_prune.structure.counting import unique_labels

#: Steps between comparisons of masks.
_EVERY = 50
#: What the learning rates should sum up to: masks start at log alpha = 9.
_ENOUGH = 20


class VIBPruning(PruningCallback):
    """Trains masks on KV groups, channels and residual features, then cuts and updates weights.

    The first `steps` of the fit train the masks with the model frozen; what is left of the fit
    trains the pruned model.

    Source: "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted Inference".

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        axes: What has masks.
        steps: Optimizer steps of the mask training.
        rate: Learning rate of the masks, which falls linearly; by default 0.05, or 0.1 for
            sparsities above 0.5.
        mean_rate: That of their means, by default the same. Where few steps ask for a high rate,
            means with a lower one are less noisy.
        kl_scale: Factor on the weights of the KL divergence; ``auto`` gives each axis the weight
            that it has in LLaMA-7B.
        threshold: ``exact`` meets the target with one threshold on log alpha; ``zero`` keeps what
            is above 0, as in the paper.
        multiple: Kept features and channels are a multiple of this: 0 (any), 8, 64, 128 or 256.
        weight_update: Fold the masks' means into the weights that are kept.
        keep_best: Compare masks on calibration windows now and then, and cut by the best.
        norm_rescale: What RMS norms do when features go: ``masked`` or ``none``; see
            `lit_prune.structure.norms.rescale`.
        samples: Calibration windows, for that and for a restoration.
        options: As for `lit_prune.pruning.PruningCallback`.
    """

    method = "VIB"
    known_axes = GATED
    looks_at = "data"
    logarithms = True

    def __init__(
        self,
        sparsity: float = 0.2,
        axes: Sequence[AxisName] = GATED,
        steps: int = 1000,
        rate: float | None = None,
        mean_rate: float | None = None,
        kl_scale: float | Literal["auto"] = "auto",
        threshold: Threshold = "exact",
        multiple: int = 128,
        weight_update: bool = True,
        keep_best: bool = True,
        norm_rescale: GatedNorms = "masked",
        samples: int = 8,
        **options: Any,
    ) -> None:
        if options.get("per_layer_ratio") is not None:
            raise UserError(
                "expected a sparsity, since masks decide how much each layer gives, got a "
                "per_layer_ratio; leave it out"
            )
        super().__init__(
            sparsity=sparsity,
            axes=axes,
            allocation="uniform",
            relative_to="decoder",
            multiple=multiple,
            start=steps,
            iterations=1,
            every=0,
            samples=samples,
            **options,
        )
        self.adaptation = Adaptation(threshold, multiple, weight_update)
        check_options(steps, rate, mean_rate, kl_scale, self.adaptation, norm_rescale)
        if "hidden" not in self.axes:
            require_unused(VIBPruning, "the axis hidden", norm_rescale=norm_rescale)
        self.rate, self.mean_rate, self.keep_best = rate, mean_rate, keep_best
        self.kl_scale: float | Literal["auto"] = kl_scale
        self.norm_rescale: GatedNorms = norm_rescale
        #: The mask training, while it lasts.
        self.training: MaskTraining | None = None
        self._windows: list[Any] = []
        self._other_loss: LossTerm | None = None
        self._before, self._start, self._rate = 0.0, 0.0, rate

    # --- mask training -------------------------------------------------------------------------

    def prepare(self, trainer: Trainer, pl_module: Prunable) -> None:
        """Check what was asked, and put masks on the frozen model."""
        super().prepare(trainer, pl_module)
        structure, labels = pl_module.structure, unique_labels(pl_module.model, pl_module.structure)
        if layered := [axis for axis in self.axes if axis != "hidden"]:
            protected, stock = self.protected_layers, self.stock
            # checks what there is to choose from
            uniform(labels, structure.widths, 0.0, layered, protected=protected, stock=stock)
        target = self.target(pl_module)
        rate = self._rate = self.rate or vib.default_rate(target)
        _warn_of_low(rate, self.start)
        gates = self._gates(pl_module)
        weights = vib.kl_weights(gates.units(), len(structure.widths.layers), target, self.kl_scale)
        objective = Objective(DecoderCount(labels, structure.widths), weights, target, self.start)
        how = replace(self.adaptation, stock=self.stock)
        self._windows = self.draw(trainer)[trainer.global_rank :: trainer.world_size]

        def begin() -> None:
            self.training = MaskTraining(
                pl_module.model, structure, gates, objective, how, self.norm_rescale
            )
            pl_module.gates = gates
            pl_module.optimization_of = lambda module: _optimization(
                gates, rate, self.start, self.mean_rate
            )

        pl_module.recut(trainer, begin)

    def _gates(self, pl_module: Prunable) -> Gates:
        """New masks, or those of the checkpoint that the fit goes on from."""
        new = Gates(pl_module.structure.widths, self.axes, self.protected_layers, self.seed)
        if not (pl_module.resumed and isinstance(pl_module.gates, Gates)):
            return new
        if pl_module.gates.spec != new.spec:
            raise UserError(
                "expected the axes, protected_layers and seed that the checkpoint was made with, "
                f"{pl_module.gates.spec}, got {new.spec}; set them so"
            )
        return pl_module.gates

    @property
    def needs_data(self) -> bool:
        """Whether anything looks at calibration tokens."""
        return self.keep_best or self.restoration.kind != "none"

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Leave the masks' noise the only one."""
        if self.training is not None:
            self.training.quieten()
            self._start = time.perf_counter() - pl_module.seconds.get("train_masks", 0.0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: Any) -> None:
        """Read the clock, so that a resumed fit counts on from here."""
        if self.training is not None:
            pl_module.seconds["train_masks"] = time.perf_counter() - self._start

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Choose the noise, and put the masks' loss in the place of another callback's."""
        if self.training is None:
            return
        number = trainer.fit_loop.total_batch_idx
        self.training.gates.reseed(trainer.global_rank, number)
        if pl_module.loss_term != self.loss:
            self._other_loss, pl_module.loss_term = pl_module.loss_term, self.loss

    def loss(self, module: Any, batch: Mapping[str, Tensor], output: Any) -> Tensor:
        """The task's loss and what masks add to it, [].

        Args:
            module: The module.
            batch: `labels` [batch, tokens].
            output: The gated model's output.
        """
        training = self._masks()
        task = cross_entropy(output.logits, batch["labels"])
        step, objective = module.trainer.global_step, training.objective
        terms = objective(training.gates, step)
        linear, quadratic = training.gates.multipliers.detach()
        target = vib.target_at(step, objective.steps, objective.target)
        course = {"target": target, "lambda_1": linear, "lambda_2": quadratic}
        for name, value in {"task": task.detach(), **terms, **course}.items():
            module.log(f"masks/{name}", torch.as_tensor(value).detach())
        return task + terms["kl"] + terms["penalty"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Clip the gradient's norm."""
        if self.training is not None:
            torch.nn.utils.clip_grad_norm_(self.training.gates.parameters(), 1.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare masks, and cut if it is time."""
        training = self.training if self.keep_best else None
        stepped = not trainer.fit_loop._should_accumulate() and trainer.global_step % _EVERY == 0
        if training is not None and stepped:
            ranks = ranks_of(trainer.strategy)
            if training.is_near(ranks):
                with whole(trainer):  # processes may have different numbers of windows
                    training.compare(self._windows, ranks)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave neither hooks nor masks to a module whose fit is broken off."""
        if self.training is not None:
            self._end(pl_module)
            pl_module.pruning_ahead = False

    def _end(self, pl_module: Any) -> None:
        if self.training is not None:
            self.training.close()
        self.training, self._windows = None, []
        pl_module.optimization_of = None
        if pl_module.loss_term == self.loss:
            pl_module.loss_term = self._other_loss
        pl_module.gates = None
        pl_module.model.train()

    # --- cutting -------------------------------------------------------------------------------

    def cut(self, trainer: Trainer, pl_module: Any, drawn: list[Any]) -> Layout:
        """Cut by the masks; what follows trains the model that is left."""
        training = self._masks()
        self.on_save_checkpoint(trainer, pl_module, None)
        if self.keep_best and training.gates.best_loss.isfinite():
            training.compare(self._windows, ranks_of(trainer.strategy))
            training.gates.recall()
        layout = super().cut(trainer, pl_module, drawn)
        self._end(pl_module)
        return layout

    def score(self, calibration: Calibration) -> Scores:
        """The masks' log alpha."""
        gates = self._masks().gates
        return gates.unpacked(gates.log_alpha(), math.inf)

    def decide(self, calibration: Calibration, scores: Scores, target: float) -> Layout:
        """What is above the threshold, in widths that are multiples."""
        decision = self._masks().settle()
        self._before = decision.before
        if calibration.shown:
            rounded = f", {decision.sparsity:.2%} with widths in multiples of {self.multiple}"
            print(
                f"{self.method}: {decision.before:.2%} of the decoder's parameters are below the "
                f"threshold{rounded if self.multiple else ''}",
                file=sys.stderr,
            )
        return decision.layout

    def apply(self, calibration: Calibration, layout: Layout) -> None:
        """Update the weights, take the masks off, and cut."""
        training = self._masks()
        training.fold(layout)
        training.close()
        layout = narrow_stream(calibration, layout, self.norm_rescale)
        super().apply(calibration, layout)

    def _masks(self) -> MaskTraining:
        if self.training is None:
            raise RuntimeError("expected masks in training")
        return self.training

    def options(self) -> dict[str, Any]:
        """What was asked for, as plain types, and the sparsity that masks alone gave."""
        found = super().options()
        for name in ("allocation", "start", "iterations", "every", "multiple"):
            found.pop(name, None)
        return found | {
            "steps": self.start,
            "rate": self._rate or vib.default_rate(self.sparsity),
            "mean_rate": self.mean_rate,
            "kl_scale": self.kl_scale,
            "threshold": self.adaptation.threshold,
            "multiple": self.multiple,
            "sparsity_before_rounding": self._before,
            "weight_update": self.adaptation.weight_update,
            "keep_best": self.keep_best,
            "norm_rescale": self.norm_rescale,
        }


def _warn_of_low(rate: float, steps: int) -> None:
    found = rate * (steps + 1) / 2
    if found < _ENOUGH:
        rank_zero_warn(
            f"expected learning rates that sum up to {_ENOUGH} or more, got {found:.1f} in {steps} "
            f"steps from {rate:g}, so that masks may stay open; raise steps or rate"
        )


def _optimization(gates: Gates, rate: float, steps: int, mean_rate: float | None) -> Any:
    optimizer, schedule = mask_optimizer(gates, rate, steps, mean_rate)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]
