"""What the dense model's blocks would have added, as targets for the scales of a pruned one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lit_prune.calibration.stream import See, Stream
from lit_prune.modes import exact_products
from lit_prune.notes import note
from lit_prune.restoration.least_squares import Gram
from lit_prune.restoration.unit_scales import LIMIT, unit_scales
from lit_prune.structure.model import Structure


class DenseTargets:
    """Targets of the outputs of O and down, layer by layer.

    A block's target is what it must add so that the pruned model's stream becomes the dense one's:
    the dense block's output plus how far the two streams have drifted apart before it, in attention
    of the same layer, too. Where a norm stands between a block and the stream, drift can't be made
    up by it: then it is left out.

    The scales themselves, and their source: `lit_prune.restoration.unit_scales`.

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
        # of all tokens, [tokens, hidden], however they are put together in batches
        self._drift = torch.empty(0)
        self._outputs: dict[str, Tensor] = {}
        self._readers: dict[str, nn.Module] = {}

    def enter(self, layer: int, stream: Stream) -> None:
        """Run the dense layer, before anything is cut from it.

        Args:
            layer: The layer.
            stream: The pruned model's stream before it.
        """
        before = _states(self.dense)
        self._readers = {
            name: self.model.get_submodule(self.structure.readers(self.model, axis, layer)[0].path)
            for name, axis in (("attention", "group"), ("ffn", "channel"))
        }
        kept: dict[str, list[Tensor]] = {name: [] for name in self._readers}
        see = {module: kept[name].append for name, module in self._readers.items()}
        self.dense.advance(layer, outputs=see)
        self._outputs = {name: _joined(kept.pop(name)) for name in self._readers}
        self._drift = before - _states(stream)
        self._direct = self._adds_up(before)
        if not self._direct:
            self._drift = torch.zeros_like(before)

    def _adds_up(self, before: Tensor) -> bool:
        """Whether both blocks' outputs go straight into the stream; first batches tell."""
        squares = torch.zeros(2, dtype=torch.float32, device=before.device)
        if len(self.dense):
            after = self.dense.states(0).float()
            first = slice(len(after))
            outputs = [self._outputs[name][first].float() for name in ("attention", "ffn")]
            added, step = sum(outputs), after - before[first].float()
            squares = torch.stack([(added - step).square().sum(), step.square().sum()])
        apart, size = self.reduce(squares).sqrt().tolist()
        return apart <= 0.2 * size

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
        passed: list[Tensor] = []  # what attention gives for the tokens to come
        done = 0

        def collect(x: Tensor) -> None:
            nonlocal done
            rows = slice(done, done + len(x))
            target = targets[rows] + self._drift[rows]
            target = target if bias is None else target - bias
            if behind:  # what attention has not made up for
                target = target + self._outputs["attention"][rows] - passed[0][: len(x)]
            with exact_products(x.dtype):
                product = x.float().T @ target.float()
            cross = product if self._cross is None else self._cross + product
            see(x)  # the last that takes memory
            self._cross, done = cross, done + len(x)
            if behind:
                passed[0] = passed[0][len(x) :]
                if not len(passed[0]):
                    passed.pop(0)

        return collect, {self._readers["attention"]: passed.append} if behind else None

    def scaled(
        self,
        weight: Tensor,
        columns: Tensor,
        coordinates: Mapping[str, Tensor],
        gram: Gram | None,
        place: str,
    ) -> Tensor | None:
        """The kept columns of a reader, each unit scaled; None once tuning has stopped.

        Args:
            weight: [outputs, inputs].
            columns: Those that stay, [kept].
            coordinates: Coordinates of each input along its axes (see `Dim.coordinates`).
            gram: X Xᵀ of its inputs.
            place: Where it is, for a note if tuning stops there.

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
            note(
                f"a unit scale at {place} is beyond {LIMIT:g}; neither it nor any block behind it "
                "is tuned"
            )
            return None
        return kept * scales[owners]


def _states(stream: Stream) -> Tensor:
    """Hidden states of all batches where a stream is, [tokens, hidden]."""
    return _joined([stream.states(batch) for batch in range(len(stream))])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0)


def _owners(coordinates: Mapping[str, Tensor]) -> Tensor:
    """The head or channel that each input belongs to, [inputs]."""
    if "channel" in coordinates:
        return coordinates["channel"]
    heads = coordinates["group"]
    if "query" in coordinates:
        heads = heads * (int(coordinates["query"].max()) + 1) + coordinates["query"]
    return heads
