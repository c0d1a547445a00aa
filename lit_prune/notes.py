"""What went otherwise than asked for: said at once, and kept for the report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed

_NOTES: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str, *, own: bool = False) -> None:
    """Warn, and write it down where something is `noting`.

    Args:
        text: What happened.
        own: Whether it happened to this process, not to all of them alike.
    """
    if own and several_processes():
        text = f"process {distributed.get_rank()}: {text}"
    found = _NOTES.get()
    if found is not None:
        if text in found:
            return  # it was said
        found.append(text)
    if own:
        warnings.warn(text, stacklevel=2)
    else:
        rank_zero_warn(text)


@contextmanager
def noting() -> Iterator[list[str]]:
    """Yield a list that gets what is noted within the context, each text once."""
    found: list[str] = []
    token = _NOTES.set(found)
    try:
        yield found
    finally:
        _NOTES.reset(token)


def of_all(notes: Sequence[str], trainer: Any) -> list[str]:
    """The notes of all processes of a trainer, each text once."""
    ranks = range(trainer.world_size) if trainer.world_size > 1 else ()
    found = [trainer.strategy.broadcast(list(notes), src=rank) for rank in ranks] or [notes]
    return list(dict.fromkeys(text for own in found for text in own))


def several_processes() -> bool:
    """Whether this process works together with others."""
    return distributed.is_available() and distributed.is_initialized() and _world() > 1


def _world() -> int:
    return distributed.get_world_size()
