"""Scores of units by the Fisher information of gates on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.allocation.ranking import Scores
from lit_prune.cutting.layerwise import device_of, inputs_of
from lit_prune.gradients.folded import activation_gradients
from lit_prune.scores.fisher import entry_fisher
from lit_prune.structure.model import Structure


def fisher_scores(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    axes: Sequence[str],
    *,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> Scores:
    """Fisher information of all entries of a unit.

    Args:
        model: A causal language model; its gradients, modes and `requires_grad` stay as they are.
        structure: Its structure.
        batches: `input_ids`, `attention_mask` and perhaps `labels`, [batch, tokens].
        axes: Axes of the layers.
        reduce: Sums a tensor over processes.
        track: Wraps the batches in a progress bar.

    Raises:
        UserError: A loss is not finite.
    """
    readers = {
        (layer, axis): structure.readers(model, axis, layer)[0]
        for axis in axes
        for layer in range(len(structure.widths.layers))
    }
    sums: dict[tuple[int, str], Tensor] = {}
    for place, site in readers.items():
        reader = model.get_submodule(site.path)
        size, device = inputs_of(reader), device_of(reader)
        sums[place] = torch.zeros(size, dtype=torch.float32, device=device)

    def fold(batch: int, layer: int, axis: str, values: Tensor, gradients: Tensor) -> None:
        sums[layer, axis] += entry_fisher(values, gradients)

    activation_gradients(model, structure, batches, axes, fold, track=track)
    scores: Scores = {axis: [] for axis in axes}
    for (layer, axis), site in readers.items():
        dim = site.line.reads
        if dim is None:
            raise TypeError(f"expected {site.path} to read an axis")
        total = reduce(sums[layer, axis]).cpu()
        scores[axis].append(dim.reduce(total, axis, structure.widths.sizes(layer)))
    return scores
