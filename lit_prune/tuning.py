"""What the dense model's blocks would have added, as targets for the scales of a pruned one's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lit_prune.calibration import See, Stream
from lit_prune.restoration import Gram, exact_products
from lit_prune.structure.model import Structure
from lit_prune.unit_scales import unit_scales


class DenseTargets:
    """Targets of the outputs of O and down, layer by layer.

    A block's target is what it must add so that the pruned model's stream becomes the dense one's:
    the dense block's output plus how far the two streams have drifted apart before it, in attention
    of the same layer, too. Where a norm stands between a block and the stream, drift can't be made
    up by it: then it is left out.

    The scales themselves, and their source: `lit_prune.unit_scales`.

    Args:
        model: The model, dense in the layers to come.
        structure: Its structure.
        dense: The calibration tokens in a stream of their own, which stays dense.
        reduce: Sums a tensor over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        dense: Stream,
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.structure, self.dense, self.reduce = model, structure, dense, reduce
        self.stopped = False
        self._direct = True
        self._cross: Tensor | None = None
        self._drift: list[Tensor] = []
        self._outputs: dict[str, list[Tensor]] = {}
        self._readers: dict[str, nn.Module] = {}

    def enter(self, layer: int, stream: Stream) -> None:
        """Run the dense layer, before anything is cut from it.

        Args:
            layer: The layer.
            stream: The pruned model's stream before it.
        """
        before = [self.dense.states(batch) for batch in range(len(self.dense))]
        self._readers = {
            name: self.model.get_submodule(self.structure.readers(self.model, axis, layer)[0].path)
            for name, axis in (("attention", "group"), ("ffn", "channel"))
        }
        self._outputs = {name: [] for name in self._readers}
        see = {module: _keeper(self._outputs[name]) for name, module in self._readers.items()}
        self.dense.advance(layer, outputs=see)
        self._drift = [x - stream.states(batch) for batch, x in enumerate(before)]
        self._direct = not before or self._adds_up(before[0])
        if not self._direct:
            self._drift = [torch.zeros_like(x) for x in before]

    def _adds_up(self, before: Tensor) -> bool:
        """Whether both blocks' outputs go straight into the stream."""
        outputs = [self._outputs[name][0].float() for name in ("attention", "ffn")]
        added, step = sum(outputs), self.dense.states(0).float() - before.float()
        return bool((added - step).norm() <= 0.2 * step.norm())

    def watch(
        self, stream: Stream, reader: nn.Module, see: See
    ) -> tuple[See, Mapping[nn.Module, See] | None]:
        """Collect the products of a reader's inputs with their targets.

        Args:
            stream: The pruned model's stream.
            reader: O or down.
            see: Is shown the inputs, too.

        Returns:
            What shall see the reader's inputs, and what the outputs of modules before it.
        """
        ffn = reader is self._readers["ffn"]
        behind = ffn and self._direct
        targets = self._outputs["ffn" if ffn else "attention"]
        bias = getattr(reader, "bias", None)  # which no unit owns
        self._cross = None
        passed: list[Tensor] = []
        number = itertools.count()

        def collect(x: Tensor) -> None:
            see(x)
            batch = next(number)
            target = targets[batch] + self._drift[batch]
            target = target if bias is None else target - bias
            if behind:  # what attention has not made up for
                target = target + self._outputs["attention"][batch] - passed.pop()
            with exact_products(x.dtype):
                product = x.float().T @ target.float()
            self._cross = product if self._cross is None else self._cross + product

        return collect, {self._readers["attention"]: passed.append} if behind else None

    def scaled(
        self,
        weight: Tensor,
        columns: Tensor,
        coordinates: Mapping[str, Tensor],
        gram: Gram | None,
    ) -> Tensor | None:
        """The kept columns of a reader, each unit scaled; None once tuning has stopped.

        Args:
            weight: [outputs, inputs].
            columns: Those that stay, [kept].
            coordinates: Coordinates of each input along its axes (see `Dim.coordinates`).
            gram: X Xᵀ of its inputs.

        Returns:
            [outputs, kept], float32.
        """
        if gram is None:
            raise TypeError("expected a Gram matrix for unit scales, got none")
        size = len(gram.matrix), weight.shape[0]
        own = gram.matrix.new_zeros(size) if self._cross is None else self._cross
        cross = self.reduce(own)  # by every process, also once tuning has stopped
        if self.stopped:
            return None
        kept = weight[:, columns].float()
        _, owners = torch.unique(_owners(coordinates)[columns.cpu()], return_inverse=True)
        owners = owners.to(weight.device)
        part = gram.matrix[columns][:, columns], cross[columns]
        scales = unit_scales(kept, *part, owners)
        if scales is None:
            self.stopped = True
            return None
        return kept * scales[owners]


def _keeper(kept: list[Tensor]) -> See:
    # copies: falcon adds attention's output to the FFN's in place
    return lambda y: kept.append(y.clone())


def _owners(coordinates: Mapping[str, Tensor]) -> Tensor:
    """The head or channel that each input belongs to, [inputs]."""
    if "channel" in coordinates:
        return coordinates["channel"]
    heads = coordinates["group"]
    if "query" in coordinates:
        heads = heads * (int(coordinates["query"].max()) + 1) + coordinates["query"]
    return heads
