"""Mask training: gates on a frozen model, from the first step to what is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_prune.cutting.decision import agreed
from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError, require_one_of
from lit_prune.gradients.folded import loss_and_tokens, mean_loss
from lit_prune.masks.adaptation import Decision, Threshold, decide
from lit_prune.masks.bottleneck import Gates, Objective
from lit_prune.masks.folding import check_fold, fold
from lit_prune.masks.gating import GatedNorms, attach
from lit_prune.memory import in_halves
from lit_prune.recovery.recomputation import without_dropout
from lit_prune.structure.layout import Layout
from lit_prune.structure.model import Structure

#: How far the expected sparsity may be from the target where masks are compared: the authors'.
_NEAR = (-0.008, 0.001)
#: Widths that dimension adaptation rounds to, or 0 for any.
_MULTIPLES = (0, 8, 64, 128, 256)


@dataclass(frozen=True)
class Adaptation:
    """How masks become a cut; see `lit_prune.masks.adaptation.decide`.

    Attributes:
        threshold: Where units are divided: ``exact`` meets the target, ``zero`` is the paper's.
        multiple: Of which residual features and channels that stay are a number; 0 for any.
        weight_update: Fold the masks' means into the weights.
        stock: Remove the same number from every layer.
    """

    threshold: Threshold = "exact"
    multiple: int = 128
    weight_update: bool = True
    stock: bool = False


def check_options(
    steps: int,
    rate: float | None,
    mean_rate: float | None,
    kl_scale: float | str,
    adaptation: Adaptation,
    norm_rescale: str,
) -> None:
    """Refuse options of a mask training that make no sense.

    Raises:
        UserError: One is out of range or unknown.
    """
    if steps < 1 or (rate is not None and not rate > 0):
        raise UserError(f"expected steps of at least 1 and a rate above 0, got {steps} and {rate}")
    if mean_rate is not None and not mean_rate > 0:
        raise UserError(f"expected a mean_rate above 0, got {mean_rate}")
    if kl_scale != "auto" and not (isinstance(kl_scale, (int, float)) and kl_scale >= 0):
        raise UserError(f"expected a kl_scale of at least 0 or auto, got {kl_scale!r}")
    if adaptation.multiple not in _MULTIPLES:
        known = ", ".join(map(str, _MULTIPLES))
        raise UserError(f"expected a multiple out of {known}, got {adaptation.multiple}")
    require_one_of("threshold", adaptation.threshold, Threshold)
    require_one_of("norm_rescale", norm_rescale, GatedNorms)


@dataclass
class MaskTraining:
    """A model whose weights are frozen while the masks on it are trained.

    Attributes:
        model: The model.
        structure: Its structure.
        gates: The masks.
        objective: What is added to the task's loss.
        adaptation: How masks become a cut.
        norm_rescale: What RMS norms do when features are cut; see `lit_prune.masks.gating.attach`.

    Raises:
        UserError: The target is out of reach, or the weights can't be updated.
    """

    model: Any
    structure: Structure
    gates: Gates
    objective: Objective
    adaptation: Adaptation = field(default_factory=Adaptation)
    norm_rescale: GatedNorms = "masked"

    def __post_init__(self) -> None:
        if self.adaptation.weight_update and "hidden" in self.gates.axes:
            check_fold(self.model, self.structure)
        self.settle()  # which masks at their start are as good for as any others
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        self._hooks = attach(self.gates, self.model, self.structure, norm_rescale=self.norm_rescale)

    def quieten(self) -> None:
        """Leave the masks' noise the only one: the model drops nothing until `close`."""
        layers = self.structure.layers(self.model)
        self._hooks.enter_context(without_dropout(self.model, layers))

    def close(self) -> None:
        """Take the gates off the model, and let its weights be trained again."""
        self._hooks.close()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained = []

    def decide(self) -> Decision:
        """What the masks would leave at present."""
        return decide(
            self.gates.unpacked(self.gates.log_alpha(), math.inf),
            self.objective.counted,
            self.objective.target,
            threshold=self.adaptation.threshold,
            multiple=self.adaptation.multiple,
            stock=self.adaptation.stock,
        )

    def settle(self) -> Decision:
        """The same, for good.

        Raises:
            UserError: An exact target is missed by more than half, since units are coarse.
        """
        found, target = self.decide(), self.objective.target
        if self.adaptation.threshold == "exact" and found.sparsity < target / 2:
            raise UserError(
                f"expected a sparsity that cutting {' and '.join(self.gates.axes)} in multiples of "
                f"{max(self.adaptation.multiple, 1)} can reach, got {target:g}, of which "
                f"{found.sparsity:.3f} would go; choose a smaller multiple or another sparsity"
            )
        return found

    def fold(self, layout: Layout) -> None:
        """Update the weights of what stays by the masks' means, if that is wanted."""
        if self.adaptation.weight_update:
            means = self.gates.unpacked(self.gates.mu, 1.0)
            fold(self.model, self.structure, means, layout)

    def is_near(self, ranks: Ranks) -> bool:
        """Whether the expected sparsity is so near to the target that masks may be compared.

        Args:
            ranks: What processes share; the first decides, since comparing is for all or none.
        """
        with torch.no_grad():
            sparsity = float(self.objective.counted.sparsity(self.gates.expected()))
        near = _NEAR[0] <= sparsity - self.objective.target <= _NEAR[1]
        return bool(ranks.agree({"near": torch.tensor(near, device="cpu")})["near"])

    @torch.no_grad()
    def compare(self, batches: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> float:
        """Keep the present masks if the model they would leave has the lowest loss so far.

        Args:
            batches: This process' windows, on which nothing is trained.
            ranks: What processes share.

        Returns:
            The loss of that model, in nats per token.
        """
        layout = agreed(ranks, self.decide().layout)
        with self.gates.holding(layout, weighted=self.adaptation.weight_update):
            loss = loss_on(self.model, batches, ranks)
        self.gates.remember(loss)
        return loss


def loss_on(model: Any, batches: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> float:
    """Mean next-token cross-entropy over the tokens of all processes, in nats.

    Args:
        model: The model, in the mode in which it shall be measured.
        batches: `input_ids`, `attention_mask` and mostly `labels`, [batch, tokens].
        ranks: What processes share.
    """
    device = next(model.parameters()).device

    terms: list[Tensor] = []

    def run(batch: Mapping[str, Tensor]) -> None:
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        terms.append(loss_and_tokens(model(**inputs, use_cache=False).logits, batch))

    in_halves(batches, run)
    return mean_loss(terms, device, ranks.reduce)
