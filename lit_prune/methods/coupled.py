"""Scores of heads, channels and residual features from the coupled components they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.statistics import require_finite
from lit_prune.cutting.layerwise import Ranks
from lit_prune.gradients.folded import weight_gradients
from lit_prune.gradients.lora import LoRA, lora_gradients
from lit_prune.methods.smoothing import Smoothing, in_order
from lit_prune.methods.unshared import unshared
from lit_prune.scores.coupled import component_scores, head_scores
from lit_prune.scores.magnitude import feature_norms, kernel_norms
from lit_prune.structure.coupling import names_of, view
from lit_prune.structure.layout import Widths
from lit_prune.structure.model import Structure

_HEADS = ("group", "query")


def coupled_scores(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    axes: Sequence[str],
    smoothing: Smoothing,
    *,
    lora: LoRA | None = None,
    ranks: Ranks | None = None,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> Scores:
    """Score heads, channels and residual features by their coupled components.

    Components are scored batch by batch and smoothed over the batches of all processes, in the
    order in which they were dealt out; then a head's are added up.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning", section 3.2.

    Args:
        model: A causal language model; it stays as it is.
        structure: Its structure.
        batches: This process' share of the batches, of one sentence each in the paper.
        axes: ``group`` or ``query``, ``channel``, ``hidden``.
        smoothing: Joins the batches; it starts anew.
        lora: Take gradients from LoRA factors instead of the weights' own.
        ranks: What processes share.
        track: Wraps the batches in a progress bar.

    Raises:
        UserError: A loss or gradient is not finite.
    """
    ranks = ranks or Ranks()
    alone = any(axis != "channel" for axis in axes)
    with unshared(model, structure) if alone else nullcontext(structure) as own:
        slots = _slots(own.widths, axes)
        # not the default dtype, which a bf16-true trainer sets
        size = max(part.stop for part, _ in slots.values())
        table = torch.zeros(len(batches), size, dtype=torch.float32, device="cpu")

        def fold(batch: int, loss: float, layer: int, weights: Any, gradients: Any) -> None:
            for name, scores in component_scores(weights, gradients, axes).items():
                require_finite(scores, "gradients", f"in layer {layer}")
                part, _ = slots[name, 0 if name == "hidden" else layer]
                table[batch, part] += scores.flatten().cpu()

        if lora is None:
            weight_gradients(model, own, batches, fold, track=track)
        else:
            reduce = ranks.reduce
            lora_gradients(model, own, batches, fold, lora, reduce=reduce, track=track)
    smoothing.restart()
    for row in in_order(table, ranks, next(model.parameters()).device):
        smoothing.update({"components": [row]})
    (joined,) = smoothing.result()["components"]
    return _by_axis(joined, slots, axes, structure.widths)


def uncoupled_scores(model: nn.Module, structure: Structure, axes: Sequence[str]) -> Scores:
    """Score heads, channels and residual features by L2 norms, as if nothing were coupled.

    Source: as of `lit_prune.scores.magnitude.kernel_norms`.

    Args:
        model: The model.
        structure: Its structure.
        axes: ``group`` or ``query``, ``channel``, ``hidden``.
    """
    found: Scores = {axis: [] for axis in axes}
    for layer in range(len(structure.widths.layers)):
        names = names_of(model, structure, layer)
        weights = {name: model.get_parameter(name).detach() for name in names}
        rows = view(model, structure, layer, weights)
        for axis in axes:
            if axis != "hidden":
                found[axis].append(kernel_norms(rows, axis).cpu())
                continue
            norms = feature_norms(rows, structure.widths.shared["hidden"]).cpu()
            found[axis] = [found[axis][0] + norms if layer else norms]
    return found


def _by_axis(
    joined: Tensor,
    slots: Mapping[tuple[str, int], tuple[slice, list[int]]],
    axes: Sequence[str],
    widths: Widths,
) -> Scores:
    """Scores of units from a row of their components'."""
    found: Scores = {axis: [] for axis in axes}
    for (name, layer), (part, shape) in slots.items():
        scores = joined[part].view(shape)
        if name == "head":
            axis = next(axis for axis in axes if axis in _HEADS)
            groups = widths.layers[layer]["group"]
            found[axis].append(head_scores(scores, groups, axis))
        else:
            found[name].append(scores)
    return found


def _slots(widths: Widths, axes: Sequence[str]) -> dict[tuple[str, int], tuple[slice, list[int]]]:
    """Where the scores of each layer's components lie in a row, and their shape."""
    shapes: dict[tuple[str, int], list[int]] = {}
    for layer, sizes in enumerate(widths.layers):
        if any(axis in _HEADS for axis in axes):
            shapes["head", layer] = [sizes["group"], widths.shared["head_dim"] + sizes["value"]]
        if "channel" in axes:
            shapes["channel", layer] = [sizes["channel"]]
    if "hidden" in axes:
        shapes["hidden", 0] = [widths.shared["hidden"]]
    found, first = {}, 0
    for key, shape in shapes.items():
        found[key] = (slice(first, first + math.prod(shape)), shape)
        first += math.prod(shape)
    return found
