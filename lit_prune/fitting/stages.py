"""When in a fit the dense, the pruned and the recovered model can be looked at."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_prune.prunable import require


class StageCallback(Callback):
    """Looks at the model when it is dense, after the last cut, and when it is trained and merged.

    Attributes:
        models: What `measure` gave for ``dense``, ``pruned`` and ``recovered``, as far as the fit
            got; plain types, since they are in its checkpoints.
    """

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}

    def measure(self, trainer: Trainer, pl_module: Any, name: str) -> Any:
        """Look at the module's model; called on all processes.

        Args:
            trainer: The trainer.
            pl_module: Its module, a `Prunable`.
            name: ``dense``, ``pruned`` or ``recovered``.

        Returns:
            Plain types, the same on all processes.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it measures")

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module that has no model to measure."""
        if stage == "fit":
            require(pl_module, self)
            self.models = {}  # of an earlier fit; a checkpoint's are loaded later

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"models": self.models}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        self.models = state_dict["models"]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the dense model, if nothing cut it or attached to it so far."""
        self.on_before_cut(trainer, pl_module)

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the dense model before it is changed for the first time."""
        if pl_module.phase == "dense" and "dense" not in self.models:
            self.models["dense"] = self.measure(trainer, pl_module, "dense")

    def on_after_cut(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the model right after the last cut."""
        if not pl_module.pruning_ahead:
            self.models["pruned"] = self.measure(trainer, pl_module, "pruned")

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the result, if anything was trained since the last cut."""
        pl_module.finish()
        pl_module.to(trainer.strategy.root_device)
        if trainer.global_step > pl_module.first_step:  # some methods train before they cut
            self.models["recovered"] = self.measure(trainer, pl_module, "recovered")
