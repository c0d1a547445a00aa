"""One row per pruning method: what it is called with in fits of tiny models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_prune import callbacks

#: Calibration of a tiny model.
_SMALL: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2}


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        callback: Name of the class in `lit_prune.callbacks`.
        options: Its options.
        steps: Optimizer steps of a fit, of which at least two come after the last cut.
        families: Tiny models it runs on in the table.
    """

    callback: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    families: tuple[str, ...] = ("llama", "gpt2")

    def make(self, **changes: Any) -> Any:
        """The callback."""
        return getattr(callbacks, self.callback)(**{**_SMALL, **self.options, **changes})


METHODS = {
    "fasp": Method("FASPPruning", {"axes": ["group", "channel"]}),
    "fasp-value": Method("FASPPruning", {"axes": ["value", "channel"]}),
    "fasp-global": Method("FASPPruning", {"allocation": "global", "restoration": "bias"}),
    "fasp-sensitivity": Method("FASPPruning", {"allocation": "sensitivity", "samples": 8}),
    "fasp-iterative": Method(
        "FASPPruning",
        {"axes": ["group", "channel"], "start": 1, "iterations": 2, "every": 1, "sparsity": 0.3},
        steps=5,
    ),
    "fasp-scales": Method("FASPPruning", {"restoration": "unit_scales"}),
    "random": Method("RandomPruning", {"axes": ["group", "channel"]}),
    "magnitude": Method("MagnitudePruning", {"axes": ["group", "channel"]}),
    "wanda": Method("WandaPruning", {"axes": ["group", "channel"]}),
    "flap": Method("FLAPPruning"),
    "taylor": Method("TaylorPruning", {"estimate": "element2"}),
    "fisher": Method("FisherPruning", {"axes": ["group", "channel"], "sparsity": 0.1}),
    "fusion": Method("AdaptiveFusionPruning", {"protected_layers": [2]}),
    "cce": Method("CoupledComponentPruning", {"sparsity": 0.3}),
    "cce-lora": Method("CoupledComponentPruning", {"gradients": "lora", "axes": ["channel"]}),
    "vib": Method("VIBPruning", {"steps": 4, "rate": 10.0, "multiple": 0}, steps=7),
    "vib-aligned": Method(
        "VIBPruning",
        {"steps": 2, "rate": 20.0, "multiple": 8, "axes": ["group", "channel"]},
        steps=4,
    ),
    "mini-llm": Method("ZerothOrderPruning", {"protected_layers": [0], "gradient_samples": 2}),
}
