"""Forward functions that are replaced, recorded or stopped for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Stop(Exception):
    """Raised by a hook once a forward pass has gone far enough."""


def recorder(played: list[Any]) -> Callable[..., None]:
    """A forward hook that keeps outputs, but no attention weights."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        played.append((output[0], None) if isinstance(output, tuple) else output)

    return hook


def parts_of(played: Any, sizes: Sequence[int]) -> list[Any]:
    """A recorded output of a batch as those of its parts."""
    if isinstance(played, tuple):
        return [(part, None) for part in parts_of(played[0], sizes)]
    rows = len(played) // sum(sizes)  # more than one where batch and tokens are one dimension
    return list(played.split([size * rows for size in sizes]))


def player(stored: Any) -> Callable[..., Any]:
    """A forward function that gives what was stored."""
    return lambda *args, **kwargs: stored


def returns_tuple(base: Any, layer: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether a family's layers return a tuple; a few tokens tell."""
    seen: list[bool] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(isinstance(output, tuple))
        raise Stop

    handle = layer.register_forward_hook(hook)
    try:
        base(input_ids=inputs["input_ids"][:1, :2], use_cache=False)
    except Stop:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace modules' forward functions for a while."""
    own = {module: vars(module).get("forward") for module in replacements}  # mostly the class's
    for module, function in replacements.items():
        module.forward = function
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


def shared(new: Any, old: Any) -> Any:
    """The old value where the new one is equal, so that it is in memory once."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        same = new is old or (new.shape == old.shape and torch.equal(new, old))
        return old if same else new
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return tuple(shared(a, b) for a, b in zip(new, old, strict=True))
    if isinstance(new, dict) and isinstance(old, dict):
        return {key: shared(value, old.get(key)) for key, value in new.items()}
    return new
