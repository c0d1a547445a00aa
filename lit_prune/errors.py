"""What a user can do wrong, said in one line."""

from __future__ import annotations

import importlib
from inspect import signature
from types import ModuleType
from typing import Any, get_args


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: what was expected, what was got, what to do. The command line prints it
    without a stack trace and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def require(module: str, extra: str) -> ModuleType:
    """Import a module that only an optional extra installs.

    Args:
        module: The module's dotted name.
        extra: The extra of this package that brings it.

    Returns:
        The imported module.

    Raises:
        UserError: The module is not installed; the message has the install command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} is needed for this and is not installed: pip install 'lit-prune[{extra}]'"
        ) from error


def require_one_of(name: str, value: Any, literal: Any) -> None:
    """Refuse a value that an annotation `Literal[...]` does not list.

    Args:
        name: Name of the option that has it.
        value: The value.
        literal: The annotation.

    Raises:
        UserError: It is none of them.
    """
    if value not in get_args(literal):
        known = ", ".join(map(str, get_args(literal)))
        raise UserError(f"expected {name} to be one of {known}, got {value!r}")


def require_unused(kind: type, needed: str, **given: Any) -> None:
    """Refuse options that were given where they do not count.

    Args:
        kind: The class whose `__init__` has them; those that have its defaults were not given.
        needed: What they count with.
        given: The options.

    Raises:
        UserError: One of them was given.
    """
    known = signature(kind.__init__).parameters
    for name, value in given.items():
        if value != known[name].default:
            raise UserError(f"expected {name} only with {needed}, got {value!r}; leave it out")
