"""Models whose change was broken off: half cut, they must not pass for whole ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lit_prune.errors import UserError

_MARK = "_lit_prune_broken_off"


@contextmanager
def changing(model: Any) -> Iterator[None]:
    """Mark a model if an error is raised within the context after a weight has changed.

    Args:
        model: The model that is changed in place.
    """
    before = [(weakref.ref(parameter), _version(parameter)) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        after = list(model.parameters())
        same = len(after) == len(before) and all(
            old() is new and version == _version(new)
            for (old, version), new in zip(before, after, strict=True)
        )
        if not same:
            setattr(model, _MARK, True)
        raise


def require_whole(model: Any) -> None:
    """Refuse a model whose change was broken off.

    Args:
        model: The model.

    Raises:
        UserError: It was.
    """
    if getattr(model, _MARK, False):
        raise UserError(
            "expected a whole model, got one that an error has left half cut; load it again, and "
            "give the fit a new module"
        )


def _version(parameter: Any) -> int:
    return 0 if parameter.is_inference() else parameter._version  # which in-place changes raise
