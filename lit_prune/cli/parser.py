"""Parsers whose every complaint is one line."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_prune.errors import UserError

_LONGEST = 400


class OneLineErrors(ArgumentParser):
    """Raises `UserError` instead of printing usage, a tip and several lines of types."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)  # else a typo can pass for an abbreviation
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report what is wrong with the arguments.

        Args:
            message: jsonargparse's words.
            ex: What it caught.

        Raises:
            UserError: Always, except inside jsonargparse's own trials.
        """
        if not self.exit_on_error:  # an inner parser: jsonargparse wants its own exception
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self._chosen()
        text = shorten(message, options_of(parser))
        raise UserError(f"{text}; see {parser.prog.replace(' [options]', '')} --help") from None

    def _chosen(self) -> ArgumentParser:
        """Find the parser of the subcommand that was given, since it knows the options."""
        commands = getattr(self._subcommands_action, "_name_parser_map", {})
        given = next((word for word in getattr(self, "args", ()) if word in commands), None)
        return self if given is None else commands[given]


def options_of(parser: Any) -> list[str]:
    """List the options that a parser knows.

    Args:
        parser: A jsonargparse parser.

    Returns:
        The option strings that start with two dashes.
    """
    return [name for name in parser._option_string_actions if name.startswith("--")]


def shorten(message: str, options: Iterable[str] = ()) -> str:
    """Make one line of a message of jsonargparse's, and name the nearest option for a typo.

    Args:
        message: The message, of several lines perhaps.
        options: Known options.

    Returns:
        One line.
    """
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message, re.DOTALL):
        text = _unknown_option(match[1].split(), list(options))
    elif match := re.search(r"does not accept (?:option|nested key) '([^']+)'", message):
        text = f"expected a known key, got {match[1]}{_nearest(match[1], _keys(options))}"
    elif match := re.search(r"(?:following arguments are required:|^Key) (\S+)", message):
        # under a subcommand the key starts with its name
        name = match[1].strip('",')
        given = next((f"--{key}" for key in _keys(options) if name.endswith(key)), name.upper())
        text = f"expected {given}, got nothing"
    elif match := re.match(r'Parser key "([^"]+)":(.*)', message, re.DOTALL):
        text = f"--{match[1]}: {_value(match[2])}"
    else:
        text = message
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1].rstrip() + "…"


def _keys(options: Iterable[str]) -> list[str]:
    return [option.removeprefix("--") for option in options]


def _unknown_option(words: list[str], options: list[str]) -> str:
    name = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
    return f"expected a known option, got {name}{_nearest(name, options)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def _value(text: str) -> str:
    """Say what was wrong with one value, see `shorten`."""
    for path, problem in _class_problems(text):
        unknown = re.search(r"Option '([^']+)' is not accepted", problem)
        if unknown:
            near = _nearest(unknown[1], _parameters(path))
            return f"{path}: expected a known argument, got {unknown[1]}{near}"
        inner = re.match(r'\s*Parser key "([^"]+)":(.*)', problem, re.DOTALL)
        return f"{path}: {inner[1]}: {_value(inner[2])}" if inner else f"{path}: {problem}"
    union = re.search(r"Subtypes: \[(.*?)\]\n.*Given value: (.*)", text, re.DOTALL)
    if union:
        return f"expected one of {_plain(union[1])}, got {union[2]}"
    simple = re.search(r"Expected an? (.*?)\. Got value: (.*)", text, re.DOTALL)
    return f"expected {_plain(simple[1])}, got {simple[2]}" if simple else text


def _class_problems(text: str) -> list[tuple[str, str]]:
    """Find the classes that jsonargparse could not use, and why.

    It also tries each value as an instance of the base class, which says nothing to anybody.
    """
    lines, found = text.splitlines(), []
    for index, line in enumerate(lines):
        match = re.match(r"(\s*-? ?)Problem with given class_path '([^']+)':", line)
        if not match:
            continue
        body = []
        for follower in lines[index + 1 :]:
            if len(follower) - len(follower.lstrip()) <= len(match[1]):
                break
            body.append(follower)
        if not match[2].startswith("lightning."):
            found.append((match[2], textwrap.dedent("\n".join(body))))
    return found


def _parameters(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def _plain(types: str) -> str:
    """Write types as a person would."""
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types)
    types = re.sub(r"typing\.Literal\[([^\]]*)\]", r"one of \1", types)
    return types.replace("typing.", "").replace("NoneType", "null")
