"""Gradients of the loss for scores, folded in and freed layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.modes import evaluating
from lit_prune.recovery.distillation import cross_entropy
from lit_prune.structure.coupling import names_of, parts, view
from lit_prune.structure.model import Structure

Rows = dict[str, Tensor]
#: Called with batch, loss, layer, weights and gradients (see `lit_prune.structure.coupling.view`).
Fold = Callable[[int, float, int, Rows, Rows], None]
#: Called with batch, layer, axis, activations and their gradients, [tokens, features] both.
FoldActivations = Callable[[int, int, str, Tensor, Tensor], None]


def weight_gradients(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    fold: Fold,
    *,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> None:
    """Back-propagate the mean next-token loss of each batch to the weights that units own.

    As soon as a layer's gradients are complete they are folded in and freed, so that there is one
    layer of them at a time.

    Args:
        model: A causal language model; its gradients, modes and `requires_grad` stay as they are.
        structure: Its structure.
        batches: `input_ids`, `attention_mask` and `labels`, [batch, tokens].
        fold: Takes what there is; it must not keep the gradients themselves.
        track: Wraps the batches in a progress bar.

    Raises:
        UserError: A loss is not finite.
    """
    layers = range(len(structure.widths.layers))
    names = {layer: names_of(model, structure, layer) for layer in layers}
    wanted = [name for layer in names.values() for name in layer]
    state: dict[str, Any] = {}
    with differentiating(model, wanted), ExitStack() as stack:
        for layer, own in names.items():
            for handle in _watch(model, structure, layer, own, fold, state):
                stack.callback(handle.remove)
        for number, batch in enumerate(track(batches)):
            loss = loss_of(model, batch)
            state.update(batch=number, loss=finite_of(loss))
            loss.backward()


def _watch(
    model: nn.Module,
    structure: Structure,
    layer: int,
    names: list[str],
    fold: Fold,
    state: dict[str, Any],
) -> list[Any]:
    """Hooks that fold a layer in once the last of its gradients is there."""
    parameters = {name: model.get_parameter(name) for name in names}
    known = parts(model, structure, layer)
    ready: set[int] = set()

    def arrived(parameter: Tensor) -> None:
        ready.add(id(parameter))
        if len(ready) < len(parameters):
            return
        ready.clear()
        weights = {name: p.detach() for name, p in parameters.items()}
        slopes = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        rows = [view(model, structure, layer, found, known) for found in (weights, slopes)]
        with torch.no_grad():
            fold(state["batch"], state["loss"], layer, *rows)
        for p in parameters.values():
            p.grad = None

    return [p.register_post_accumulate_grad_hook(arrived) for p in parameters.values()]


def activation_gradients(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    axes: Sequence[str],
    fold: FoldActivations,
    *,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> None:
    """Back-propagate to the inputs of the modules that read the axes; weights get no gradient.

    The loss is summed over tokens, so that a token's gradient does not depend on how many there
    are; padded tokens are left out.

    Args:
        model: A causal language model; its modes and `requires_grad` stay as they are.
        structure: Its structure.
        batches: `input_ids`, `attention_mask` and `labels`, [batch, tokens].
        axes: Axes of the layers, such as ``channel``.
        fold: Takes activations and their gradients.
        track: Wraps the batches in a progress bar.

    Raises:
        UserError: A loss is not finite.
    """
    state: dict[str, Any] = {}
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    with differentiating(model, []), ExitStack() as stack:
        handle = embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_())
        stack.callback(handle.remove)
        for layer in range(len(structure.widths.layers)):
            for axis in axes:
                reader = model.get_submodule(structure.readers(model, axis, layer)[0].path)
                hook = _Reader(state, layer, axis, fold)
                stack.callback(reader.register_forward_pre_hook(hook).remove)
        for number, batch in enumerate(track(batches)):
            state.update(batch=number, tokens=_tokens(model, batch))
            loss = loss_of(model, batch)
            finite_of(loss)
            (loss * int((labels_of(batch)[:, 1:] != -100).sum())).backward()


class _Reader:
    """Pre-hook that hands a module's input on with its gradient."""

    def __init__(self, state: dict[str, Any], layer: int, axis: str, fold: FoldActivations) -> None:
        self.state, self.layer, self.axis, self.fold = state, layer, axis, fold

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        value = args[0].detach()

        def arrived(gradient: Tensor) -> None:
            rows, tokens = value.flatten(0, -2), self.state["tokens"]
            slopes = gradient.flatten(0, -2)
            if tokens is not None:
                rows, slopes = rows[tokens], slopes[tokens]
            self.fold(self.state["batch"], self.layer, self.axis, rows, slopes)

        args[0].register_hook(arrived)


@contextmanager
def differentiating(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let only some parameters take gradients, in eval mode; put everything back afterwards."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    chosen = {id(model.get_parameter(name)) for name in names}
    with evaluating(model), torch.enable_grad():
        try:
            for parameter in before:
                parameter.requires_grad_(id(parameter) in chosen)
                parameter.grad = None
            yield
        finally:
            for parameter, (required, gradient) in before.items():
                parameter.requires_grad_(required)
                parameter.grad = gradient


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A batch's mean next-token cross-entropy, []."""
    device = next(model.parameters()).device
    mask = batch["attention_mask"].to(device)
    output = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=None if bool(mask.all()) else mask,
        use_cache=False,
    )
    return cross_entropy(output.logits, labels_of(batch).to(device))


def mean_loss(
    terms: Iterable[Tensor],
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
) -> float:
    """Mean next-token cross-entropy over the tokens of all processes, in nats.

    Args:
        terms: Of each batch what `loss_and_tokens` gives.
        device: Where to sum up.
        reduce: Sums a tensor over processes.
    """
    total = torch.zeros(2, dtype=torch.float32, device=device)
    for term in terms:
        total += term.to(device)
    total = reduce(total)
    return float(total[0] / total[1])


def loss_and_tokens(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum of a batch's next-token cross-entropy and number of predicted tokens, [2].

    Args:
        logits: [batch, tokens, vocabulary].
        batch: The batch that they are of.
    """
    labels = labels_of(batch).to(logits.device)
    tokens = (labels[:, 1:] != -100).sum()
    return torch.stack([cross_entropy(logits, labels) * tokens, tokens.float()])


def labels_of(batch: Mapping[str, Tensor]) -> Tensor:
    """A batch's labels, or its tokens without the padding where it has none, [batch, tokens]."""
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


def _tokens(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor | None:
    mask = batch["attention_mask"].bool()
    return None if bool(mask.all()) else mask.flatten().to(next(model.parameters()).device)


def finite_of(loss: Tensor) -> float:
    """A loss as a number.

    Raises:
        UserError: It is NaN or infinite.
    """
    value = float(loss.detach())
    if not value - value == 0:  # NaN and infinity alike
        raise UserError(
            f"expected a finite loss on the calibration text, got {value}; check the model's "
            "weights, or use --model.dtype float32"
        )
    return value
