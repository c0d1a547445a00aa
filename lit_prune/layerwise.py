"""Pruning layer by layer: score, choose, restore and cut one layer, then move on through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.allocation import Plan, keep_highest
from lit_prune.calibration import Stream, evaluating
from lit_prune.errors import UserError
from lit_prune.restoration import Gram, least_squares
from lit_prune.scores import column_scores
from lit_prune.structure.cut import cut_layer
from lit_prune.structure.layout import Layout
from lit_prune.structure.model import Site, Structure


@dataclass(frozen=True)
class Restoration:
    """How the kept columns make up for the removed ones; see `least_squares`.

    Attributes:
        enabled: Whether they do at all.
        ridge: What the solution shrinks towards.
        delta: The ridge in units of the mean diagonal.
    """

    enabled: bool = True
    ridge: Literal["weights", "zero"] = "weights"
    delta: float = 1e-3


@dataclass(frozen=True)
class Ranks:
    """What several processes must do together; alone they do nothing.

    Attributes:
        reduce: Sums a tensor over the processes.
        agree: Gives every process the first one's decision.
    """

    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    agree: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda decision: decision


def prune_layers(
    model: nn.Module,
    structure: Structure,
    stream: Stream,
    plan: Plan,
    *,
    restoration: Restoration | None = None,
    ranks: Ranks | None = None,
    track: Callable[[range], Iterator[int]] = iter,
) -> Layout:
    """Prune a model in place with FASP, layer by layer; each layer sees the pruned one before it.

    At no time is there more than one Gram matrix in memory beside the stream (see `Stream`).

    Source: "FASP: Fast and Accurate Structured Pruning of Large Language Models", section 3.

    Args:
        model: The model; its weights are replaced.
        structure: Its structure; its widths follow.
        stream: Calibration tokens before the first layer.
        plan: Units to remove from each layer.
        restoration: How the kept weights are repaired; the default is least squares.
        ranks: What processes share.
        track: Wraps the layers' range in a progress bar.

    Returns:
        The kept units, in the numbering of the model as it came.

    Raises:
        UserError: The calibration activations or the weights that read them are not finite.
    """
    layout = Layout.full(structure.widths)
    restoration, ranks = restoration or Restoration(), ranks or Ranks()
    axes = [axis for axis in ("group", "query", "value", "channel") if axis in plan.removed]
    with evaluating(model), torch.no_grad():
        for layer in track(range(len(structure.widths.layers))):
            keep: dict[str, Tensor] = {}
            attention = _attention(model, structure, layer)
            recorded = False
            for axis in axes:
                removed = plan.removed[axis][layer]
                if not removed:
                    continue
                recorded = axis == "channel"
                site = structure.readers(model, axis, layer)[0]
                reader = model.get_submodule(site.path)
                gram = _observe(stream, layer, site, reader, attention if recorded else None)
                gram.matrix = ranks.reduce(gram.matrix)
                kept = ranks.agree(_choose(structure, site, reader, gram, axis, removed))
                _apply(model, structure, site, gram, kept, restoration)
                keep |= kept
                del gram  # before the next one is made
            layout = layout.replace_layer(layer, keep)
            stream.advance(layer, play=attention if recorded else None)
    return layout


def _attention(model: nn.Module, structure: Structure, layer: int) -> nn.Module:
    path = structure.readers(model, "group", layer)[0].path
    return model.get_submodule(path.rpartition(".")[0])


def _observe(
    stream: Stream, layer: int, site: Site, reader: nn.Module, record: nn.Module | None
) -> Gram:
    weight = reader.get_parameter("weight")
    size = weight.shape[0] if isinstance(reader, Conv1D) else weight.shape[1]
    gram = Gram(size, weight.device)
    stream.observe(layer, reader, gram.add, record=record)
    return gram


def _require_finite(values: Tensor, what: str, place: str) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            f"expected finite {what}, got NaN or infinity {place}; check the model's weights, or "
            f"use --model.dtype float32"
        )


def _matrix(module: nn.Module) -> Tensor:
    """A linear module's weight as [outputs, inputs]."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _choose(
    structure: Structure, site: Site, reader: nn.Module, gram: Gram, axis: str, removed: int
) -> dict[str, Tensor]:
    sizes = structure.widths.sizes(site.layer)
    _require_finite(
        gram.matrix.diagonal(), "calibration activations", f"at the input of {site.path}"
    )
    scores = column_scores(_matrix(reader), gram.norms())
    _require_finite(scores, "weights", f"in {site.path}")
    if site.line.reads is None:
        raise TypeError(f"expected {site.path} to read an axis")
    return {axis: keep_highest(site.line.reads.reduce(scores.cpu(), axis, sizes), removed)}


def _apply(
    model: nn.Module,
    structure: Structure,
    site: Site,
    gram: Gram,
    keep: Mapping[str, Tensor],
    restoration: Restoration,
) -> None:
    """Restore the reader's kept columns, then cut the units out of the layer."""
    reader = model.get_submodule(site.path)
    if site.line.reads is None or site.layer is None:
        raise TypeError(f"expected {site.path} to read an axis in a layer")
    restored = None
    if restoration.enabled:
        columns = site.line.reads.positions(structure.widths.sizes(site.layer), keep)
        restored = least_squares(
            _matrix(reader),
            gram.matrix,
            columns.to(gram.matrix.device),
            ridge=restoration.ridge,
            delta=restoration.delta,
        )
    cut_layer(model, structure, site.layer, keep)
    if restored is not None:
        _matrix(reader).copy_(restored)
