"""Calibration tokens on their way through a model, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.interception import Stop, forwards, parts_of, player, recorder, returns_tuple, shared
from lit_prune.memory import fits, halves, in_halves, shown
from lit_prune.modes import evaluating
from lit_prune.structure.model import Structure

#: Is shown activations, [tokens, features].
See = Callable[[Tensor], None]
#: Of each layer what it is called with beside hidden states.
_Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
_Seen = list[tuple[See, Tensor]]


class Stream:
    """The hidden states of calibration batches before some layer, and how layers are called.

    The stream is a [batch, tokens, hidden] tensor for each batch, in the model's dtype; while the
    FFN of a layer is pruned, the outputs of its attention are kept too, as large again. Masks and
    position embeddings are held once where batches share them.

    A batch that memory runs out with is split in two for good, so that there may be more of them
    than were given; functions that see activations get all tokens in their order all the same.

    Args:
        model: A causal language model.
        structure: Its structure.
        batches: Batches with `input_ids` and `attention_mask`, [batch, tokens]; may be empty.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, batches: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.layers = structure.layers(model)
        self.batches: list[Mapping[str, Tensor]] = []
        self.hidden: list[Tensor] = []
        self.tokens: list[Tensor | None] = []
        #: Where what runs before the layers is in memory, if that is not always so.
        self.entrance: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._model, self._as_tuple = model, False
        self._calls: list[_Calls] = []
        self._played: list[Any] = []
        with evaluating(model):
            in_halves(batches, self._add)

    def _add(self, batch: Mapping[str, Tensor]) -> None:
        hidden, calls, tokens = self._enter(batch, self._calls[-1] if self._calls else None)
        self.batches.append(batch)
        self.hidden.append(hidden)
        self._calls.append(calls)
        self.tokens.append(tokens)

    @torch.no_grad()
    def _enter(
        self, batch: Mapping[str, Tensor], like: _Calls | None
    ) -> tuple[Tensor, _Calls, Tensor | None]:
        """Run a batch up to the first layer.

        Args:
            batch: The batch.
            like: Calls of another one, to share tensors with.

        Returns:
            Hidden states there, each layer's other arguments, and what tokens count if not all.
        """
        model: Any = self._model
        device = next(model.parameters()).device
        mask = batch["attention_mask"].to(device).bool()
        full = bool(mask.all())
        inputs = {
            "input_ids": batch["input_ids"].to(device),
            "attention_mask": None if full else mask.long(),
            "use_cache": False,
        }
        base: Any = getattr(model, str(model.base_model_prefix))
        if like is None:
            self._as_tuple = returns_tuple(base, self.layers[0], inputs)
        calls: _Calls = []
        entered: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not calls:
                entered.append(hidden)
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append((args[1:], rest))
            return (hidden, None) if self._as_tuple else hidden

        with forwards(dict.fromkeys(self.layers, record)):
            base(**inputs)
        if like is not None:
            calls = [shared(new, old) for new, old in zip(calls, like, strict=True)]
        return entered[0], calls, None if full else mask.flatten()

    def each(self, run: Callable[[int], None]) -> None:
        """Call a function with the number of each batch; splits a batch that memory runs out with.

        Args:
            run: As for `lit_prune.memory.fits`.

        Raises:
            UserError: A single window is too large.
        """
        batch = 0
        while batch < len(self):
            if fits(lambda batch=batch: run(batch)):
                batch += 1
            else:
                self._split(batch)

    def _split(self, batch: int) -> None:
        """Put two batches in a batch's place."""
        parts, old = halves(self.batches[batch]), self._calls[batch]
        sizes = [len(part["input_ids"]) for part in parts]
        with self.entrance(), evaluating(self._model):
            entered = [self._enter(part, old) for part in parts]
        here = slice(batch, batch + 1)
        self.batches[here] = parts
        self.hidden[here] = self.hidden[batch].split(sizes)
        self.tokens[here] = [tokens for *_, tokens in entered]
        self._calls[here] = [  # of layers behind, they are not needed any more
            [new if any(was) else was for new, was in zip(calls, old, strict=True)]
            for _, calls, _ in entered
        ]
        if batch < len(self._played):
            self._played[here] = parts_of(self._played[batch], sizes)

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

        def run(batch: int) -> None:
            seen: _Seen = []
            played: list[Any] = []
            with ExitStack() as hooks:
                for module, function in (outputs or {}).items():
                    hooks.callback(self._after(module, function, batch, seen).remove)
                if record is not None:
                    hooks.callback(record.register_forward_hook(recorder(played)).remove)
                hooks.callback(self._before(reader, see, batch, seen, stop=True).remove)
                try:
                    self.run(layer, batch)
                except Stop:
                    pass
                else:
                    raise RuntimeError(f"layer {layer} did not call {type(reader).__name__}")
            self._played += played
            _show(seen)

        self.each(run)

    def _rows(self, x: Tensor, batch: int) -> Tensor:
        """Activations as [tokens, features], without padded tokens."""
        tokens, x = self.tokens[batch], x.flatten(0, -2)
        return x if tokens is None else x[tokens]

    def _before(
        self, module: nn.Module, see: See, batch: int, seen: _Seen, *, stop: bool = False
    ) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append((see, self._rows(args[0], batch)))
            if stop:
                raise Stop

        return module.register_forward_pre_hook(hook)

    def _after(self, module: nn.Module, see: See, batch: int, seen: _Seen) -> Any:
        # copies: falcon adds attention's output to the FFN's in place
        return module.register_forward_hook(
            lambda _m, _a, y: seen.append((see, self._rows(y, batch).clone()))
        )

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

        def run(batch: int) -> None:
            seen: _Seen = []
            with ExitStack() as hooks:
                for module, see in (inputs or {}).items():
                    hooks.callback(self._before(module, see, batch, seen).remove)
                for module, see in (outputs or {}).items():
                    hooks.callback(self._after(module, see, batch, seen).remove)
                if play is not None:
                    hooks.enter_context(forwards({play: player(self._played[batch])}))
                self.hidden[batch] = self.run(layer, batch)
            _show(seen)

        self.each(run)
        self._played = []
        for calls in self._calls:
            calls[layer] = ((), {})

    @torch.no_grad()
    def finish(self, model: nn.Module, layer: int, number: int) -> Any:
        """The model's output for a batch, from where the stream is.

        Args:
            model: The model.
            layer: The layer that comes next.
            number: The batch's number.
        """
        base: Any = getattr(model, str(model.base_model_prefix))
        batch, device = self.batches[number], self.hidden[number].device
        inputs = {"input_ids": batch["input_ids"].to(device), "use_cache": False}
        mask = batch["attention_mask"].to(device)
        as_tuple = returns_tuple(base, self.layers[-1], inputs)

        def skip(*args: Any, **kwargs: Any) -> Any:
            return (self.hidden[number], None) if as_tuple else self.hidden[number]

        with forwards(dict.fromkeys(self.layers[:layer], skip)):
            return model(attention_mask=None if bool(mask.all()) else mask, **inputs)


def _show(seen: _Seen) -> None:
    """Show what was collected, once nothing can make the layer run again."""
    while seen:
        see, rows = seen.pop(0)
        shown(see, rows)
