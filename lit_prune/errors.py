"""What a user can do wrong, said in one line."""

from __future__ import annotations

import importlib
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


def require_one_of(value: Any, literal: Any) -> None:
    """Refuse a value that an annotation `Literal[...]` does not list.

    Args:
        value: The value.
        literal: The annotation.

    Raises:
        UserError: It is none of them.
    """
    if value not in get_args(literal):
        raise UserError(f"expected one of {', '.join(map(str, get_args(literal)))}, got {value!r}")
