"""How much the loss rises when one layer alone is cut: what each layer can give."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lit_prune.allocation.plan import keep_highest
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.layerwise import ORDER, Ranks, Restoration, device_of, inputs_of, matrix_of
from lit_prune.errors import UserError
from lit_prune.gradients.folded import loss_and_tokens, mean_loss
from lit_prune.modes import evaluating
from lit_prune.restoration.least_squares import least_squares
from lit_prune.structure.model import Structure

#: The share of a layer's units that is taken away to see what they are worth.
TRIAL = 0.6
#: A target above this is a high one.
_HIGH = 0.35

#: Scores the units of an axis of a layer, given their reader and its inputs.
UnitScore = Callable[[int, str, nn.Module, InputStatistics], Tensor]


def loss_rises(
    model: nn.Module,
    structure: Structure,
    stream: Stream,
    held: Stream,
    score: UnitScore,
    axes: Sequence[str],
    *,
    layers: Sequence[int],
    restoration: Restoration,
    ranks: Ranks,
    track: Callable[[Sequence[int]], Iterator[int]] = iter,
) -> list[float]:
    """Cut most of one layer's units, measure the loss, and put them back; layer by layer.

    Args:
        model: The model; it is as before afterwards.
        structure: Its structure.
        stream: Calibration tokens before the first layer.
        held: Windows set aside for the loss, in a stream of their own before the first layer.
        score: Ranks a layer's units.
        axes: Axes of the layers that are cut, by `TRIAL` of their units each.
        layers: The layers to try.
        restoration: With ``least_squares`` the kept columns are restored before the loss is taken.
        ranks: What processes share.
        track: Wraps the layers in a progress bar.

    Returns:
        The rise of the mean loss for each of the layers, in nats per token.
    """
    rises, wanted = [], set(layers)
    with evaluating(model), torch.no_grad():
        dense = _loss(model, 0, held, ranks)
        for layer in track(range(max(wanted, default=-1) + 1)):
            if layer in wanted:
                with _without(model, structure, stream, layer, score, axes, restoration, ranks):
                    rises.append(_loss(model, layer, held, ranks) - dense)
            stream.advance(layer)
            held.advance(layer)
    return rises


def shares(rises: Sequence[float], target: float) -> list[float]:
    """What each layer can give: s^-½ of its loss rise s, or s^-¼ at high targets.

    Where much goes, every layer must give a lot, and the flatter share was the better one.

    A rise below 5 % of the median magnitude counts as that, so that noise does not empty a layer;
    a loss that falls counts so, too.

    Args:
        rises: Loss rise of each layer.
        target: Share of the decoder's parameters to remove, by all cuts together.

    Raises:
        UserError: A rise is not finite.
    """
    middle = statistics.median(abs(rise) for rise in rises)
    if any(rise - rise != 0 for rise in rises):
        raise UserError(
            f"expected a finite loss when a layer is cut, got {rises}; check the model's weights, "
            "or use --model.dtype float32"
        )
    least = 0.05 * middle or 1.0
    power = 0.25 if target > _HIGH else 0.5
    return [max(rise, least) ** -power for rise in rises]


@contextmanager
def _without(
    model: nn.Module,
    structure: Structure,
    stream: Stream,
    layer: int,
    score: UnitScore,
    axes: Sequence[str],
    restoration: Restoration,
    ranks: Ranks,
) -> Iterator[None]:
    """Take most of a layer's units out for a while, by zeros in the matrices that read them."""
    before: list[tuple[Tensor, Tensor]] = []
    sizes = structure.widths.sizes(layer)
    try:
        for axis in [axis for axis in ORDER if axis in axes]:
            site = structure.readers(model, axis, layer)[0]
            reader = model.get_submodule(site.path)
            repair = restoration.kind == "least_squares"
            seen = InputStatistics(inputs_of(reader), device_of(reader), gram=repair)
            stream.observe(layer, reader, seen.add)
            seen.reduce(ranks.reduce)
            units = score(layer, axis, reader, seen)
            kept = keep_highest(units, min(round(TRIAL * units.shape[-1]), units.shape[-1] - 1))
            keep = ranks.agree({axis: kept})
            if site.line.reads is None:
                raise TypeError(f"expected {site.path} to read an axis")
            columns = site.line.reads.positions(sizes, keep).to(device_of(reader))
            matrix = matrix_of(reader)
            before.append((matrix, matrix.clone()))
            new = matrix[:, columns]
            if seen.gram is not None:
                ridge, delta = restoration.ridge, restoration.delta
                new = least_squares(
                    matrix, seen.gram.matrix, columns, ridge=ridge, delta=delta, place=site.path
                )
            matrix.zero_()
            matrix[:, columns] = new.to(matrix.dtype)
        yield
    finally:
        for matrix, old in reversed(before):
            matrix.copy_(old)


def _loss(
    model: nn.Module,
    layer: int,
    held: Stream,
    ranks: Ranks,
) -> float:
    """Mean loss of the windows set aside, from a layer on."""
    terms: list[Tensor] = []

    def run(number: int) -> None:
        logits = held.finish(model, layer, number).logits
        terms.append(loss_and_tokens(logits, held.batches[number]))

    held.each(run)
    return mean_loss(terms, next(model.parameters()).device, ranks.reduce)
