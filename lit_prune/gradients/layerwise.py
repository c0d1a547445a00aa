"""Gradients of the loss that come layer by layer, each layer's of all batches in a row."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.calibration.stream import Stream
from lit_prune.errors import UserError
from lit_prune.gradients.folded import Fold, Rows, differentiating, finite_of, loss_of
from lit_prune.structure.coupling import names_of, view
from lit_prune.structure.model import Structure

#: Called with a layer and its weights when its gradients of all batches have been folded in.
Finish = Callable[[int, Rows], None]


def layer_gradients(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    fold: Fold,
    finish: Finish,
    *,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> None:
    """Fold in the gradients of all batches for the last layer, then for the one before it, ….

    The gradients are those of `lit_prune.gradients.folded.weight_gradients`, whose order is the
    other: all layers of the first batch, then of the second. Here a score that must add up
    gradients entry by entry needs sums for one layer only, not for the whole model.

    For that, the hidden states before each layer are written to a temporary file while the loss is
    computed, and each layer runs once more when its turn comes: four thirds of the time. In memory
    are one layer's activations of one batch, one layer's gradients, and a hidden state and its
    gradient for each batch. The file takes layers * tokens * hidden size entries.

    Args:
        model: A causal language model; its gradients, modes and `requires_grad` stay as they are.
        structure: Its structure.
        batches: `input_ids`, `attention_mask` and `labels`, [batch, tokens]; may be empty.
        fold: Takes what there is; it must not keep the gradients themselves.
        finish: Told that a layer is complete; also without any batch.
        track: Wraps the layers' range in a progress bar.

    Raises:
        UserError: A loss is not finite, or there is no room for the file.
    """
    stream = Stream(model, structure, batches)
    stream.hidden = [torch.empty(0)] * len(batches)  # they will come from the tape
    with tempfile.TemporaryFile(prefix="lit-prune-", buffering=0) as file:
        tape = _Tape(file)
        losses, slopes = _forward(model, structure, batches, tape)
        for layer in track(range(len(structure.widths.layers) - 1, -1, -1)):
            names = names_of(model, structure, layer)
            parameters = {name: model.get_parameter(name) for name in names}
            weights = view(model, structure, layer, {k: p.detach() for k, p in parameters.items()})
            with differentiating(model, names):
                for batch, loss in enumerate(losses):
                    hidden = tape.read(batch, layer).to(slopes[batch].device).requires_grad_()
                    stream.hidden[batch] = hidden
                    stream.run(layer, batch).backward(slopes[batch])
                    stream.hidden[batch] = torch.empty(0)
                    slopes[batch] = _taken(hidden)
                    found = {name: _taken(p) for name, p in parameters.items()}
                    with torch.no_grad():
                        fold(batch, loss, layer, weights, view(model, structure, layer, found))
            with torch.no_grad():
                finish(layer, weights)


def _taken(leaf: Tensor) -> Tensor:
    """A leaf's gradient, which it gives away."""
    gradient, leaf.grad = leaf.grad, None
    return torch.zeros_like(leaf) if gradient is None else gradient


def _forward(
    model: nn.Module, structure: Structure, batches: Sequence[Mapping[str, Tensor]], tape: _Tape
) -> tuple[list[float], list[Tensor]]:
    """Losses, and gradients with respect to the output of the last layer, batch by batch."""
    layers = structure.layers(model)
    top: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tape.write(args[0] if args else kwargs["hidden_states"])

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        plain = isinstance(output, Tensor)
        top.append((output if plain else output[0]).detach().requires_grad_())
        return top[-1] if plain else (top[-1], *output[1:])

    losses: list[float] = []
    slopes: list[Tensor] = []
    with differentiating(model, []), ExitStack() as hooks:
        for module in layers:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        hooks.callback(layers[-1].register_forward_hook(leave).remove)
        for batch in batches:
            tape.next_batch()
            loss = loss_of(model, batch)
            losses.append(finite_of(loss))
            loss.backward()
            slopes.append(_taken(top.pop()))
    return losses, slopes


class _Tape:
    """Hidden states in a file.

    Args:
        file: An open binary file, empty and unbuffered (a buffer would fail again when closed).
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.places: list[list[tuple[int, torch.Size, torch.dtype]]] = []

    def next_batch(self) -> None:
        """What is written next is before the first layer of the next batch."""
        self.places.append([])

    def write(self, hidden: Tensor) -> None:
        """Add the hidden states before the next layer."""
        self.places[-1].append((self.file.tell(), hidden.shape, hidden.dtype))
        content = hidden.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        try:
            while content:
                content = content[self.file.write(content) :]
        except OSError as error:
            raise UserError(
                f"expected room for hidden states in {tempfile.gettempdir()}, got "
                f"{error.strerror}; set TMPDIR to a folder with more, or use fewer samples"
            ) from error

    def read(self, batch: int, layer: int) -> Tensor:
        """Hidden states of a batch before a layer, on the CPU."""
        place, shape, dtype = self.places[batch][layer]
        self.file.seek(place)
        content = bytearray(shape.numel() * dtype.itemsize)
        rest = memoryview(content)
        while rest:
            rest = rest[self.file.readinto(rest) :]
        return torch.frombuffer(content, dtype=dtype).view(shape)
