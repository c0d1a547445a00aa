"""What an object was made with, remembered for a comparison with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from inspect import Parameter, signature
from os import PathLike
from typing import Any


class RemembersOptions:
    """Base of a class whose instances know the arguments they were made with.

    Attributes:
        made_with: Arguments by name, as plain types, those that were left out with their defaults;
            of what is no plain type, its class.
    """

    made_with: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Remember the arguments."""
        made = super().__new__(cls)
        made.made_with = _plain(_arguments(cls, args, kwargs))
        return made


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Options that both know and that are not equal, as `name old (here new)`.

    Args:
        old: What was asked for.
        new: What is asked for now.
    """
    return [
        f"{name} {old[name]} (here {new[name]})"
        for name in old
        if name in new and old[name] != new[name]
    ]


def defaults_of(cls: type) -> dict[str, Any]:
    """Defaults of the arguments that a class and its bases take, by name."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):  # a subclass hands `**options` on
        if "__init__" in vars(base) and base is not object:
            for parameter in signature(vars(base)["__init__"]).parameters.values():
                if parameter.default is not Parameter.empty:
                    found[parameter.name] = parameter.default
    return found


def _arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    found = defaults_of(cls)
    own = signature(cls.__init__)
    try:
        bound = own.bind_partial(None, *args, **kwargs).arguments
    except TypeError:  # which __init__ will say better
        return found
    for name, value in list(bound.items())[1:]:
        more = own.parameters[name].kind is Parameter.VAR_KEYWORD
        found.update(value if more else {name: value})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(part) for part in value]
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Set):
        return sorted(map(str, value))
    plain = getattr(value, "tolist", None)  # a number or an array of numpy or torch
    if callable(plain):
        value = plain()
        if isinstance(value, list):
            return _plain(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # not a subclass, such as numpy's floats
    return None if value is None else type(value).__name__
