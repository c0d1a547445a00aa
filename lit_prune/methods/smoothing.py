"""Scores that come batch by batch, joined: importance times uncertainty, or their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.calibration import Calibration
from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.structure.dims import PER_GROUP


class Smoothing:
    """PLATON's smoothing of a score I that comes batch by batch.

    With Ī, Ū and S from 0, each batch does::

        Ī ← x1 Ī + (1 - x1) I;    Ū ← x2 Ū + (1 - x2) |I - Ī|;    S ← S + Ī Ū

    Start anew with each evaluation: carried on over cuts, a score that stays the same fades, since
    its S comes from the start at 0 alone.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning", equation 7.

    Args:
        enabled: Whether to smooth; else the result is the plain mean.
        x1: Share of the old importance that is kept.
        x2: Share of the old uncertainty that is kept.

    Raises:
        UserError: A share is not in [0, 1).
    """

    def __init__(self, enabled: bool = True, x1: float = 0.5, x2: float = 0.5) -> None:
        if not (0 <= x1 < 1 and 0 <= x2 < 1):
            raise UserError(
                f"expected smoothing shares x1 and x2 from 0 to below 1, got {x1:g} and {x2:g}"
            )
        self.enabled, self.x1, self.x2 = enabled, x1, x2
        self.restart()

    def restart(self) -> None:
        """Forget all batches."""
        self.batches = 0
        self._importance: Scores = {}
        self._uncertainty: Scores = {}
        self._total: Scores = {}

    def update(self, scores: Mapping[str, Sequence[Tensor]]) -> None:
        """Take in one batch's scores.

        Args:
            scores: Name -> tensors, of the same shapes in every batch.
        """
        if not self.batches:
            for state in (self._importance, self._uncertainty, self._total):
                state.update({name: [_zeros(x) for x in list_] for name, list_ in scores.items()})
        self.batches += 1
        for name, tensors in scores.items():
            for place, tensor in enumerate(tensors):
                self._add(name, place, tensor.to(self._total[name][place]))

    def _add(self, name: str, place: int, score: Tensor) -> None:
        total = self._total[name][place]
        if not self.enabled:
            total += score
            return
        importance, uncertainty = self._importance[name][place], self._uncertainty[name][place]
        importance.lerp_(score, 1 - self.x1)
        uncertainty.lerp_((score - importance).abs(), 1 - self.x2)
        total += importance * uncertainty

    def result(self) -> Scores:
        """The joined scores.

        Raises:
            ValueError: There was no batch.
        """
        if not self.batches:
            raise ValueError("expected at least one batch of scores, got none")
        divisor = 1 if self.enabled else self.batches
        return {name: [x / divisor for x in tensors] for name, tensors in self._total.items()}


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def batch_by_batch(calibration: Calibration, score: Callable[[Calibration], Scores]) -> Scores:
    """Score each batch alone, and smooth over the batches of all processes.

    Args:
        calibration: The model and its calibration tokens.
        score: Called with one batch, as if there were one process.
    """
    slots = _slots(calibration)
    entries = sum(math.prod(shape) for *_, shape in slots)
    # not the defaults, which a trainer sets
    table = torch.zeros(len(calibration.batches), entries, dtype=torch.float32, device="cpu")
    numbers = range(len(calibration.batches))
    for number in calibration.track("batches")(numbers):
        batch = [calibration.batches[number]]
        alone = replace(calibration, batches=batch, held=(), ranks=Ranks(), shown=False)
        found = score(alone)
        row = [found[axis][layer].flatten().cpu() for axis, layer, _ in slots]
        table[number] = torch.cat(row)
    smoothing = Smoothing()
    device = next(calibration.model.parameters()).device
    for row in in_order(table, calibration.ranks, device):
        smoothing.update({"units": [row]})
    (joined,) = smoothing.result()["units"]
    scores: Scores = {axis: [] for axis in calibration.axes}
    parts = joined.split([math.prod(shape) for *_, shape in slots])
    for (axis, _, shape), part in zip(slots, parts, strict=True):
        scores[axis].append(part.view(shape))
    return scores


def _slots(calibration: Calibration) -> list[tuple[str, int, tuple[int, ...]]]:
    """Axis, layer and shape of each tensor of scores; a process without batches knows them, too."""
    widths, found = calibration.structure.widths, []
    for axis in calibration.axes:
        if axis == "hidden":
            found.append((axis, 0, (widths.shared[axis],)))
            continue
        for layer, sizes in enumerate(widths.layers):
            shape = (sizes["group"], sizes[axis]) if axis in PER_GROUP else (sizes[axis],)
            found.append((axis, layer, shape))
    return found


def in_order(table: Tensor, ranks: Ranks, device: torch.device) -> Iterator[Tensor]:
    """Rows of all processes in the order in which their batches were dealt out, one each.

    Args:
        table: This process' rows, [batches, entries], on the CPU.
        ranks: What processes share.
        device: Where they share it.
    """
    counts = [int(n) for n in ranks.gather(torch.tensor(len(table), device=device))]
    padded = table.new_zeros(max(counts), table.shape[1])
    padded[: len(table)] = table
    tables = [found.cpu() for found in ranks.gather(padded.to(device))]
    for turn in range(max(counts)):
        for found, number in zip(tables, counts, strict=True):
            if turn < number:
                yield found[turn]
