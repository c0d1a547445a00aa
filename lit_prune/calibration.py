"""Calibration tokens on their way through a model, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.structure.model import Structure

#: Is shown activations, [tokens, features].
See = Callable[[Tensor], None]


class _Stop(Exception):
    """Raised by a hook once a forward pass has gone far enough."""


class Stream:
    """The hidden states of calibration batches before some layer, and how layers are called.

    The stream is a [batch, tokens, hidden] tensor for each batch, in the model's dtype; while the
    FFN of a layer is pruned, the outputs of its attention are kept too, as large again. Masks and
    position embeddings are held once where batches share them.

    Args:
        model: A causal language model.
        structure: Its structure.
        batches: Batches with `input_ids` and `attention_mask`, [batch, tokens]; may be empty.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.layers = structure.layers(model)
        self.hidden: list[Tensor] = []
        self.tokens: list[Tensor | None] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._played: list[Any] = []
        with evaluating(model):
            for batch in batches:
                self._enter(model, batch)

    @torch.no_grad()
    def _enter(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Run a batch up to the first layer, and record each layer's other arguments."""
        device = next(model.parameters()).device
        mask = batch["attention_mask"].to(device).bool()
        full = bool(mask.all())
        inputs = {
            "input_ids": batch["input_ids"].to(device),
            "attention_mask": None if full else mask.long(),
            "use_cache": False,
        }
        base: Any = getattr(model, str(model.base_model_prefix))
        as_tuple = _returns_tuple(base, self.layers[0], inputs)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not calls:
                self.hidden.append(hidden)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append((args[1:], rest))
            return (hidden, None) if as_tuple else hidden

        with _forwards(dict.fromkeys(self.layers, record)):
            base(**inputs)
        if self._calls:
            calls = [_share(new, old) for new, old in zip(calls, self._calls[-1], strict=True)]
        self._calls.append(calls)
        self.tokens.append(None if full else mask.flatten())

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.hidden)

    def run(self, layer: int, batch: int) -> Tensor:
        """A layer's output for a batch, [batch, tokens, hidden]."""
        args, kwargs = self._calls[batch][layer]
        output = self.layers[layer](self.hidden[batch], *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def observe(
        self,
        layer: int,
        reader: nn.Module,
        see: See,
        *,
        record: nn.Module | None = None,
        outputs: Mapping[nn.Module, See] | None = None,
    ) -> None:
        """Show a module's inputs to a function, batch by batch; the stream stays where it is.

        Args:
            layer: The layer to run.
            reader: A module in it; nothing behind it is computed.
            see: Gets [tokens, features], without padded tokens.
            record: A module whose outputs `advance` shall play back instead of computing them
                again. It must come before `reader`.
            outputs: Functions that see the outputs of modules before `reader`, likewise.
        """
        self._played = []
        for batch in range(len(self)):
            with ExitStack() as hooks:
                for module, function in (outputs or {}).items():
                    hooks.callback(self._after(module, function, batch).remove)
                if record is not None:
                    hooks.callback(record.register_forward_hook(self._record).remove)
                hooks.callback(self._before(reader, see, batch, stop=True).remove)
                try:
                    self.run(layer, batch)
                except _Stop:
                    continue
                raise RuntimeError(f"layer {layer} did not call {type(reader).__name__}")

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        # attention weights, if there are any, are not kept
        self._played.append((output[0], None) if isinstance(output, tuple) else output)

    def _rows(self, x: Tensor, batch: int) -> Tensor:
        """Activations as [tokens, features], without padded tokens."""
        tokens, x = self.tokens[batch], x.flatten(0, -2)
        return x if tokens is None else x[tokens]

    def _before(self, module: nn.Module, see: See, batch: int, *, stop: bool = False) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(self._rows(args[0], batch))
            if stop:
                raise _Stop

        return module.register_forward_pre_hook(hook)

    def _after(self, module: nn.Module, see: See, batch: int) -> Any:
        return module.register_forward_hook(lambda _m, _a, y: see(self._rows(y, batch)))

    def states(self, batch: int) -> Tensor:
        """Hidden states of a batch where the stream is, [tokens, hidden], without padded tokens."""
        return self._rows(self.hidden[batch], batch)

    @torch.no_grad()
    def advance(
        self,
        layer: int,
        *,
        play: nn.Module | None = None,
        inputs: Mapping[nn.Module, See] | None = None,
        outputs: Mapping[nn.Module, See] | None = None,
    ) -> None:
        """Move the stream through a layer.

        Args:
            layer: The layer.
            play: A module whose recorded outputs are used instead of running it.
            inputs: Functions that see the inputs of modules, [tokens, features] for each batch.
            outputs: Functions that see their outputs.
        """
        for batch in range(len(self)):
            with ExitStack() as hooks:
                for module, see in (inputs or {}).items():
                    hooks.callback(self._before(module, see, batch).remove)
                for module, see in (outputs or {}).items():
                    hooks.callback(self._after(module, see, batch).remove)
                if play is not None:
                    hooks.enter_context(_forwards({play: _player(self._played[batch])}))
                self.hidden[batch] = self.run(layer, batch)
        self._played = []
        for calls in self._calls:
            calls[layer] = ((), {})

    @torch.no_grad()
    def finish(self, model: nn.Module, layer: int, batch: Mapping[str, Tensor], number: int) -> Any:
        """The model's output for a batch, from where the stream is.

        Args:
            model: The model.
            layer: The layer that comes next.
            batch: The batch, as it was given.
            number: Its number.
        """
        base: Any = getattr(model, str(model.base_model_prefix))
        device = self.hidden[number].device
        inputs = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
        mask = batch["attention_mask"].to(device)
        as_tuple = _returns_tuple(base, self.layers[-1], inputs)

        def skip(*args: Any, **kwargs: Any) -> Any:
            return (self.hidden[number], None) if as_tuple else self.hidden[number]

        with _forwards(dict.fromkeys(self.layers[:layer], skip)):
            return model(attention_mask=None if bool(mask.all()) else mask, **inputs)


def _player(stored: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: stored


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _returns_tuple(base: Any, layer: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a family's layers return a tuple; a few tokens tell."""
    seen: list[bool] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise _Stop

    handle = layer.register_forward_hook(hook)
    try:
        base(input_ids=inputs["input_ids"][:1, :2], use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace modules' forward functions for a while."""
    for module, function in replacements.items():
        module.forward = function
    try:
        yield
    finally:
        for module in replacements:
            del module.forward


def _share(new: Any, old: Any) -> Any:
    """The old value where the new one is equal, so that it is in memory once."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new is old or (new.shape == old.shape and torch.equal(new, old))
        return old if same else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(_share(a, b) for a, b in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: _share(value, old.get(key)) for key, value in new.items()}
    return new
