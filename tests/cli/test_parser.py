"""jsonargparse's complaints, made one line."""

from __future__ import annotations

import pytest
from jsonargparse import ArgumentParser

from lit_prune.cli.parser import OneLineErrors, options_of, shorten
from lit_prune.errors import UserError

_OPTIONS = ["--trainer.max_steps", "--trainer.max_epochs", "--model.pretrained", "--overwrite"]
_UNION = """Parser key "trainer.callbacks":
  Does not validate against any of the Union subtypes
  Subtypes: [list[lightning.Callback], <class 'lightning.Callback'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'tests.cli.test_parser.Method':
        {problem}
    - Problem with given class_path 'lightning.Callback':
        Option 'x' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'list'>
  Given value: [...]"""


class Method:
    """A class to configure."""

    def __init__(self, sparsity: float = 0.2) -> None:
        self.sparsity = sparsity


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "unrecognized arguments: --trainer.max_stps 5",
            "expected a known option, got --trainer.max_stps (did you mean --trainer.max_steps?)",
        ),
        (
            "unrecognized arguments: --overwrit=1",
            "expected a known option, got --overwrit (did you mean --overwrite?)",
        ),
        ("unrecognized arguments: extra words", "expected a known option, got extra"),
        (
            "Subcommand 'fit' does not accept option 'trainer.max_step'",
            "expected a known key, got trainer.max_step (did you mean trainer.max_steps?)",
        ),
        (
            "the following arguments are required: fit.model.pretrained",
            "expected --model.pretrained, got nothing",
        ),
        (
            "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: three",
            "--trainer.max_steps: expected int, got three",
        ),
        (
            'Parser key "x":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'str'>, <class 'NoneType'>]\n  Errors:\n    - Expected\n"
            "  Given value type: <class 'list'>\n  Given value: [1]",
            "--x: expected one of str, null, got [1]",
        ),
        (
            _UNION.format(problem="Option 'sparsty' is not accepted"),
            "--trainer.callbacks: tests.cli.test_parser.Method: expected a known argument, got "
            "sparsty (did you mean sparsity?)",
        ),
        (
            _UNION.format(problem="No module named 'x'"),
            "--trainer.callbacks: tests.cli.test_parser.Method: No module named 'x'",
        ),
        (
            _UNION.format(
                problem="Parser key \"sparsity\":\n          Expected a <class 'float'>. "
                "Got value: much"
            ),
            "--trainer.callbacks: tests.cli.test_parser.Method: sparsity: expected float, got much",
        ),
        ("while parsing\n  line 1,\n column 4.", "while parsing line 1, column 4"),
    ],
)
def test_one_line(message: str, line: str) -> None:
    assert shorten(message, _OPTIONS) == line


def test_a_long_message_is_cut() -> None:
    assert len(shorten("word " * 1000)) <= 400


def test_the_parser_raises_and_names_its_help() -> None:
    parser = OneLineErrors(prog="lit-prune try")
    parser.add_class_arguments(Method, "method")
    assert "--method.sparsity" in options_of(parser)
    with pytest.raises(UserError) as caught:
        parser.parse_args(["--method.sparsty=3"])
    assert str(caught.value) == (
        "expected a known option, got --method.sparsty (did you mean --method.sparsity?); see "
        "lit-prune try --help"
    )


def test_abbreviations_are_typos() -> None:
    parser = OneLineErrors(prog="lit-prune try")
    parser.add_argument("--overwrite", action="store_true")
    with pytest.raises(UserError, match="did you mean --overwrite"):
        parser.parse_args(["--overwr"])


def test_a_subcommands_options_are_suggested() -> None:
    parser, command = OneLineErrors(prog="lit-prune"), OneLineErrors()
    command.add_argument("--sparsity", type=float, default=0.2)
    parser.add_subcommands().add_subcommand("fit", command)
    with pytest.raises(UserError, match=r"did you mean --sparsity\?\); see lit-prune fit --help"):
        parser.parse_args(["fit", "--sparsty", "0.3"])
    with pytest.raises(UserError, match="--sparsity: expected float, got much"):
        parser.parse_args(["fit", "--sparsity", "much"])


def test_inner_parsers_keep_jsonargparses_exception() -> None:
    with pytest.raises(Exception, match="unrecognized") as expected:
        ArgumentParser(exit_on_error=False).parse_args(["--x"])
    with pytest.raises(expected.type, match="unrecognized"):
        OneLineErrors(exit_on_error=False).parse_args(["--x"])
