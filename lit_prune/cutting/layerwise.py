"""Pruning layer by layer: choose, restore and cut in one layer, then move on through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.allocation.plan import Plan, keep_highest
from lit_prune.calibration.statistics import InputStatistics, require_finite
from lit_prune.calibration.stream import Stream
from lit_prune.cutting.wholeness import changing
from lit_prune.modes import evaluating, exact_products
from lit_prune.restoration.least_squares import least_squares
from lit_prune.restoration.tuning import DenseTargets
from lit_prune.structure.biases import add_bias
from lit_prune.structure.cut import cut_layer
from lit_prune.structure.layout import Layout
from lit_prune.structure.model import Site, Structure

Ridge = Literal["weights", "zero"]
Repair = Literal["none", "least_squares", "bias", "unit_scales"]
#: Scores the columns of a matrix [outputs, inputs] from statistics of its inputs: [inputs].
ColumnScore = Callable[[Tensor, InputStatistics], Tensor]
#: The axes of a layer: heads are cut before channels, whose inputs then follow the cut.
ORDER = ("group", "query", "value", "channel")


@dataclass(frozen=True)
class Restoration:
    """How what is left makes up for what goes.

    Attributes:
        kind: ``least_squares`` changes the kept columns (see `least_squares`), ``bias`` adds the
            removed columns' mean output, ``unit_scales`` scales the kept units of blocks that are
            cut (see `lit_prune.restoration.unit_scales`), ``none`` does nothing.
        ridge: What least squares shrinks towards.
        delta: Its ridge in units of the mean diagonal.
    """

    kind: Repair = "least_squares"
    ridge: Ridge = "weights"
    delta: float = 1e-3


@dataclass(frozen=True)
class Choice:
    """What stays of each layer.

    Attributes:
        cuts: Whether anything of an axis goes from a layer.
        units: The units of an axis that stay in a layer, from a reader and its inputs.
    """

    cuts: Callable[[int, str], bool]
    units: Callable[[int, str, nn.Module, InputStatistics], Tensor]


@dataclass(frozen=True)
class Ranks:
    """What several processes must do together; alone they do nothing.

    Attributes:
        reduce: Sums a tensor over the processes.
        agree: Gives every process the first one's decision.
        gather: Every process' tensor, of one shape, in the order of their ranks.
    """

    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
    agree: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda decision: decision
    gather: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]


def by_columns(
    structure: Structure,
    score: ColumnScore,
    plan: Plan,
    found: dict[str, dict[int, Tensor]] | None = None,
) -> Choice:
    """Keep the units whose columns score highest, as many as a plan leaves.

    Args:
        structure: The model's structure.
        score: Scores columns.
        plan: Units to remove from each layer.
        found: Gets the scores, axis -> layer -> what `unit_scores` returns, of what is cut.
    """

    def units(layer: int, axis: str, reader: nn.Module, statistics: InputStatistics) -> Tensor:
        scores = unit_scores(structure, layer, axis, reader, statistics, score)
        if found is not None:
            found.setdefault(axis, {})[layer] = scores
        return keep_highest(scores, plan.removed[axis][layer])

    return Choice(lambda layer, axis: plan.removed.get(axis, {layer: 0})[layer] > 0, units)


def as_decided(layout: Layout) -> Choice:
    """Keep the units that a layout keeps."""
    keep = {unit.source: unit.keep for unit in layout.layers}
    return Choice(
        lambda layer, axis: axis in keep[layer], lambda layer, axis, *_: keep[layer][axis]
    )


def unit_scores(
    structure: Structure,
    layer: int,
    axis: str,
    reader: nn.Module,
    statistics: InputStatistics,
    score: ColumnScore,
) -> Tensor:
    """Column scores of a reader, summed over each unit's columns.

    Returns:
        [units], or [groups, units] for `query` and `value`, on the CPU.

    Raises:
        UserError: The weights or activations are not finite.
    """
    found = ((p, line.reads) for p, line in structure.lines if line.reads and axis in line.reads)
    pattern, dim = next(found)
    path = pattern.replace("*", str(layer), 1)
    require_finite(statistics.norms(), "calibration activations", f"at the input of {path}")
    values = score(matrix_of(reader), statistics).float()
    require_finite(values, "weights", f"in {path}")
    return dim.reduce(values.cpu(), axis, structure.widths.sizes(layer))


def prune_layers(
    model: nn.Module,
    structure: Structure,
    stream: Stream,
    choice: Choice,
    axes: Sequence[str],
    *,
    restoration: Restoration | None = None,
    dense: Stream | None = None,
    ranks: Ranks | None = None,
    track: Callable[[range], Iterator[int]] = iter,
) -> Layout:
    """Prune a model in place, layer by layer; each layer sees the pruned one before it.

    Beside the stream (see `Stream`) there is one Gram matrix in memory at a time. Unit scales take
    more: the dense stream, a layer's outputs, and three matrices of that size or less.

    Source: "FASP: Fast and Accurate Structured Pruning of Large Language Models", section 3.

    Args:
        model: The model; its weights are replaced.
        structure: Its structure; its widths follow.
        stream: Calibration tokens before the first layer.
        choice: Says what stays, such as `by_columns` or `as_decided`.
        axes: Axes of the layers that it chooses from.
        restoration: How the kept weights are repaired; the default is least squares.
        dense: The same tokens in a stream of their own, which ``unit_scales`` needs.
        ranks: What processes share.
        track: Wraps the layers' range in a progress bar.

    Returns:
        The kept units, in the numbering of the model as it came.

    Raises:
        UserError: Activations, weights that read them or what repairs these are not finite, or
            memory is too small for one window. The model may be half cut then; it is marked so,
            and can't be exported.
    """
    restoration, ranks = restoration or Restoration(), ranks or Ranks()
    targets = None
    if restoration.kind == "unit_scales":
        if dense is None:
            raise TypeError("expected a dense stream for unit scales, got none")
        targets = DenseTargets(model, structure, dense, ranks.reduce)
    walk = _Walk(model, structure, stream, choice, restoration, ranks, targets)
    layout = Layout.full(structure.widths)
    with evaluating(model), torch.no_grad(), changing(model):
        for layer in track(range(len(structure.widths.layers))):
            keep = walk.layer(layer, [axis for axis in ORDER if axis in axes])
            layout = layout.replace_layer(layer, keep)
    return layout


@dataclass
class _Walk:
    model: nn.Module
    structure: Structure
    stream: Stream
    choice: Choice
    restoration: Restoration
    ranks: Ranks
    targets: DenseTargets | None

    def layer(self, layer: int, axes: Sequence[str]) -> dict[str, Tensor]:
        """Prune a layer and move the stream through what is left; the units that stay."""
        keep: dict[str, Tensor] = {}
        attention, played = self._attention(layer), None
        if self.targets is not None:
            self.targets.enter(layer, self.stream)
        for axis in axes:
            if not self.choice.cuts(layer, axis):
                continue
            site = self.structure.readers(self.model, axis, layer)[0]
            reader = self.model.get_submodule(site.path)
            played = attention if axis == "channel" else None
            statistics = self._observe(layer, reader, played)
            kept = self.ranks.agree({axis: self.choice.units(layer, axis, reader, statistics)})
            self._apply(site, statistics, kept)
            keep |= kept
            del statistics  # before the next Gram matrix is made
        self.stream.advance(layer, play=played)
        return keep

    def _attention(self, layer: int) -> nn.Module:
        path = self.structure.readers(self.model, "group", layer)[0].path
        return self.model.get_submodule(path.rpartition(".")[0])

    def _observe(
        self, layer: int, reader: nn.Module, attention: nn.Module | None
    ) -> InputStatistics:
        gram = self.restoration.kind in ("least_squares", "unit_scales")
        statistics = InputStatistics(inputs_of(reader), device_of(reader), gram=gram)
        see, outputs = statistics.add, None
        if self.targets is not None:
            see, outputs = self.targets.watch(self.stream, reader, see)
        self.stream.observe(layer, reader, see, record=attention, outputs=outputs)
        statistics.reduce(self.ranks.reduce)
        return statistics

    def _apply(self, site: Site, statistics: InputStatistics, keep: Mapping[str, Tensor]) -> None:
        """Restore the reader's kept columns, then cut the units out of the layer."""
        reader = self.model.get_submodule(site.path)
        if site.line.reads is None or site.layer is None:
            raise TypeError(f"expected {site.path} to read an axis in a layer")
        place = f"at the input of {site.path}"
        require_finite(statistics.norms(), "calibration activations", place)
        sizes = self.structure.widths.sizes(site.layer)
        stays = site.line.reads.mask(sizes, keep).to(device_of(reader))
        columns, kind = stays.nonzero().flatten(), self.restoration.kind
        restored = offset = None
        if kind == "least_squares" and statistics.gram is not None:
            restored = least_squares(
                matrix_of(reader),
                statistics.gram.matrix,
                columns,
                ridge=self.restoration.ridge,
                delta=self.restoration.delta,
                place=site.path,
            )
        elif kind == "bias":
            offset = mean_output(matrix_of(reader), statistics.mean, ~stays)
        elif kind == "unit_scales" and self.targets is not None:
            heads = site.line.reads.coordinates(sizes)
            own = matrix_of(reader), columns, heads, statistics.gram
            restored = self.targets.scaled(*own, site.path)
        for found in (restored, offset):
            if found is not None:  # as the weights will have it: float16 ends at 65,504
                kept = found.to(matrix_of(reader).dtype)
                require_finite(kept, "restored weights", f"in {site.path}")
        cut_layer(self.model, self.structure, site.layer, keep)
        if restored is not None:
            matrix_of(reader).copy_(restored)
        if offset is not None:
            raise_bias(reader, offset)


def mean_output(weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """What removed columns put out on average: W_P mean(X_P), [outputs], float32.

    Source: "Fluctuation-based Adaptive Structured Pruning for Large Language Models", the baseline
    compensation of section 3.3.

    Args:
        weight: [outputs, inputs].
        mean: Mean of each input, [inputs].
        removed: Which columns go, booleans [inputs].
    """
    with exact_products(torch.float32):
        return weight[:, removed].float() @ mean[removed]


@torch.no_grad()
def raise_bias(module: nn.Module, offset: Tensor) -> None:
    """Add to a linear module's bias; it gets one if it has none.

    Args:
        module: The module.
        offset: [outputs].
    """
    add_bias(module)
    bias = module.get_parameter("bias")
    bias.copy_(bias.float() + offset)


def matrix_of(module: nn.Module) -> Tensor:
    """A linear module's weight as [outputs, inputs]."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def inputs_of(module: nn.Module) -> int:
    """Number of features that a linear module reads."""
    return matrix_of(module).shape[1]


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weight is."""
    return module.get_parameter("weight").device
