"""Commands that are plain functions: their signature is their command line."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, get_origin, get_type_hints

from lit_prune.cli.guard import guarded
from lit_prune.errors import UserError

_TRUTHS = ("true", "false", "yes", "no")


def run_command(module: str, function: str, argv: Sequence[str], name: str) -> int:
    """Import a function and run it as a command.

    Args:
        module: The function's module.
        function: Its name.
        argv: The arguments.
        name: The command's name.

    Returns:
        The exit code.
    """

    def action() -> None:
        call_function(getattr(importlib.import_module(module), function), argv, name)

    return guarded(action)


def call_function(function: Callable[..., Any], argv: Sequence[str], name: str) -> Any:
    """Call a function with arguments parsed by its signature.

    Parameters without a default are positional on the command line unless they are keyword-only;
    a list, which can only be the first, takes all words before the options.
    One that is False by default may be given without a value.

    Args:
        function: The function, annotated and with a Google docstring.
        argv: The arguments.
        name: The command's name.

    Returns:
        What the function returns.

    Raises:
        UserError: The arguments don't fit.
    """
    from lit_prune.cli.parser import OneLineErrors

    parameters = list(inspect.signature(function).parameters.values())
    options: set[str | int] = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positionals: set[str | int] = {p.name for p in parameters if p.name not in options}
    parser = OneLineErrors(
        prog=f"lit-prune {name}", description=(inspect.getdoc(function) or "").split("\n\n")[0]
    )
    for others, positional in ((options, True), (positionals, False)):
        parser.add_function_arguments(
            function, as_group=False, as_positional=positional, skip=others
        )
    switches = {f"--{p.name}" for p in parameters if p.default is False}
    if positionals and get_origin(get_type_hints(function)[parameters[0].name]) is list:
        argv = _gathered(argv, parameters[0].name)
    config = parser.parse_args(_switched(argv, switches))
    values = parser.instantiate(config)
    return function(**{parameter.name: values[parameter.name] for parameter in parameters})


def _gathered(argv: Sequence[str], name: str) -> list[str]:
    """Make one value of the words before the first option, as a list in JSON."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if not count and argv and argv[0] not in ("-h", "--help"):
        raise UserError(f"expected {name} before the options, got {argv[0]} first; put them there")
    return [*([json.dumps(argv[:count])] if count else []), *argv[count:]]


def _switched(argv: Sequence[str], switches: set[str]) -> list[str]:
    """Add the value that a switch stands for where it is given alone."""
    followers = [*argv, ""][1:]
    return [
        f"{word}=true" if word in switches and follower.lower() not in _TRUTHS else word
        for word, follower in zip(argv, followers, strict=True)
    ]
