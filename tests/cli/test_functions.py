"""A function's signature is its command line."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from lit_prune.cli.functions import call_function, run_command
from lit_prune.errors import UserError


def export(run: str, *, out: str, merge: bool = True, kind: Literal["a", "b"] = "a") -> Any:
    """Write a checkpoint.

    Args:
        run: The run's folder.
        out: Where to.
        merge: Merge the adapter.
        kind: One of two.
    """
    if run == "missing":
        raise UserError("expected a run, got 'missing'")
    return run, out, merge, kind


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["r", "--out", "o"], ("r", "o", True, "a")),
        (["--out=o", "--merge", "false", "r", "--kind", "b"], ("r", "o", False, "b")),
    ],
)
def test_required_parameters_are_positional_and_keyword_only_ones_options(
    argv: list[str], expected: tuple[object, ...]
) -> None:
    assert call_function(export, argv, "export") == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "expected RUN, got nothing"),
        (["r"], "expected --out, got nothing"),
        (["r", "--out", "o", "--merg", "true"], "did you mean --merge?"),
        (["r", "--out", "o", "--kind", "c"], "expected one of 'a', 'b', got c"),
        (["missing", "--out", "o"], "expected a run, got 'missing'"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(__name__, "export", argv, "export") == 2
    err = capsys.readouterr().err
    assert err.startswith("lit-prune: error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--json"], (True, False, "m")),
        (["--json", "--stock"], (True, True, "m")),
        (["--json", "true", "--stock=yes"], (True, True, "m")),
        (["--json", "false"], (False, False, "m")),
        (["--stock", "--name", "false"], (False, True, "false")),
    ],
)
def test_a_switch_may_stand_alone(words: list[str], expected: tuple[object, ...]) -> None:
    def switches(*, json: bool = False, stock: bool = False, name: str = "m") -> Any:
        """Return them."""
        return json, stock, name

    assert call_function(switches, words, "x") == expected


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(__name__, "export", ["--help"], "export") == 0
    out = capsys.readouterr().out
    assert "usage: lit-prune export" in out
    assert "Write a checkpoint." in out
    assert "Where to." in out


def test_a_command_is_imported_when_it_runs() -> None:
    assert run_command("builtins", "print", ["--help"], "print") in (0, 1, 2)
    assert run_command("lit_prune.no_such_module", "x", [], "x") == 1


def gather(models: list[str], *, html: str | None = None) -> Any:
    """Take several.

    Args:
        models: Folders.
        html: A file.
    """
    return models, html


def test_words_of_a_list_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_function(gather, ["a", "b", "--html", "x"], "gather") == (["a", "b"], "x")
    for argv in (["--html", "x", "a", "b"], ["--html=x"]):
        assert run_command(__name__, "gather", argv, "gather") == 2
        err = capsys.readouterr().err
        assert "expected models before the options" in err
        assert err.count("\n") == 1
