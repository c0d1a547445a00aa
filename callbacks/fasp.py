"""FASP: structured Wanda scores, coupled rows and columns, least-squares restoration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune.allocation import Plan, uniform
from lit_prune.calibration import Stream
from lit_prune.errors import UserError
from lit_prune.layerwise import Restoration, prune_layers
from lit_prune.module import PrunableLM
from lit_prune.progress import track
from lit_prune.ranks import ranks_of
from lit_prune.structure import Layout
from lit_prune.structure.counting import count_actual, unique_labels
from lit_prune.structure.limits import require_axes, require_stock


class FASPPruning(Callback):
    """Prunes the module's model at the start of a fit, layer by layer.

    Source: "FASP: Fast and Accurate Structured Pruning of Large Language Models".

    Args:
        sparsity: Share of the decoder layers' parameters to remove.
        attention: What goes in attention: whole KV ``group``s, ``query`` heads (the same number
            from each group), or ``none``, when FFN channels alone make up the sparsity.
        samples: Calibration windows.
        length: Tokens of a calibration window.
        batch_size: Windows that go through a layer at once.
        protected_layers: Layers that stay whole.
        restoration: Change the kept weights by least squares to make up for the removed ones.
        ridge: What that shrinks towards: the kept ``weights``, or ``zero`` as in the paper.
        delta: Its ridge in units of the mean diagonal of the Gram matrix.
    """

    def __init__(
        self,
        sparsity: float = 0.2,
        attention: Literal["none", "group", "query"] = "none",
        samples: int = 32,
        length: int = 512,
        batch_size: int = 4,
        protected_layers: Sequence[int] = (),
        restoration: bool = True,
        ridge: Literal["weights", "zero"] = "weights",
        delta: float = 1e-3,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise UserError(f"expected a sparsity from 0 to below 1, got {sparsity:g}")
        if not delta > 0:
            raise UserError(f"expected a delta above 0, got {delta:g}")
        self.sparsity = sparsity
        self.axes = ["channel"] if attention == "none" else [attention, "channel"]
        self.samples, self.length, self.batch_size = samples, length, batch_size
        self.protected_layers = list(protected_layers)
        self.restoration = Restoration(restoration, ridge, delta)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Prune, unless the fit resumes from after the cut.

        Raises:
            UserError: The target is out of reach, the calibration text too short, or its
                activations are not finite.
        """
        if pl_module.phase != "dense":
            if not pl_module.resumed:
                raise UserError(
                    f"expected a dense model to prune, got one in phase {pl_module.phase!r}; list "
                    "FASPPruning before LoRARecovery, and give each fit a new module"
                )
            return
        plan = self.plan(pl_module)
        batches = self._batches(trainer)
        pl_module.recut(trainer, lambda: self._prune(trainer, pl_module, plan, batches))

    def plan(self, pl_module: PrunableLM) -> Plan:
        """How many units go from each layer."""
        structure, model_type = pl_module.structure, pl_module.model.config.model_type
        require_axes(model_type, structure.axes(), self.axes)
        if pl_module.stock:
            require_stock(model_type, structure.family, structure.widths, self.axes)
        return uniform(
            unique_labels(pl_module.model, structure),
            structure.widths,
            self.sparsity,
            self.axes,
            protected=self.protected_layers,
            stock=pl_module.stock,
        )

    def _batches(self, trainer: Any) -> list[dict[str, Tensor]]:
        data: Any = getattr(trainer, "datamodule", None)
        if not hasattr(data, "calibration_batches"):
            raise UserError(
                "expected a data module with calibration_batches(samples, length, batch_size), "
                f"got {type(data).__name__}; use lit_prune.TextDataModule or add that method"
            )
        trainer.lightning_module.check_length(self.length, "calibration windows")
        batches = data.calibration_batches(self.samples, self.length, self.batch_size)
        return batches[trainer.global_rank :: trainer.world_size]

    def _prune(
        self, trainer: Trainer, pl_module: PrunableLM, plan: Plan, batches: list[dict[str, Tensor]]
    ) -> Layout:
        model, structure = pl_module.model, pl_module.structure
        before = {d: count_actual(model, structure, decoder=d) for d in (True, False)}
        stream = Stream(model, structure, batches)
        layout = prune_layers(
            model,
            structure,
            stream,
            plan,
            restoration=self.restoration,
            ranks=ranks_of(trainer.strategy),
            track=lambda layers: track(layers, "FASP: pruning layers", trainer.is_global_zero),
        )
        removed = {d: 1 - count_actual(model, structure, decoder=d) / before[d] for d in before}
        pl_module.history.append(
            {
                "base": pl_module.pretrained,
                "method": "FASP",
                "options": self._options(),
                "sparsity": {
                    "target": self.sparsity,
                    "decoder": removed[True],
                    "total": removed[False],
                },
            }
        )
        return layout

    def _options(self) -> dict[str, Any]:
        return {
            "axes": list(self.axes),
            "calibration": f"{self.samples} x {self.length} tokens",
            "protected_layers": self.protected_layers,
            "restoration": self.restoration.enabled,
            "ridge": self.restoration.ridge,
            "delta": self.restoration.delta,
        }
