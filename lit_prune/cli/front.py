"""The front of the command line: answers help and version at once, then loads what is heavy.

Importing Lightning takes seconds, so nothing here imports more than a little of the standard
library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "fit": "prune a model, repair it, export it, report what it cost",
    "validate": "measure a model on the validation text",
    "test": "measure a model on the test text",
    "predict": "run a model on the prediction text",
    "inspect": "list what can be cut from a model and what that would save; needs no weights",
    "export": "write the checkpoint of an interrupted or finished run",
    "evaluate": "measure perplexity, tasks, cost and speed of a model beside the dense one",
    "compare": "put runs and checkpoints side by side",
    "prune-streaming": "prune a model larger than memory, layer by layer from files to files",
}
_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_FUNCTIONS = {
    "inspect": ("lit_prune.cli.inspect", "inspect_model"),
    "export": ("lit_prune.cli.export", "export_run"),
    "evaluate": ("lit_prune.cli.evaluate", "evaluate_model"),
    "compare": ("lit_prune.cli.compare", "compare_models"),
}
_HELP = """\
usage: lit-prune COMMAND [options]

Structured pruning of language models inside one PyTorch Lightning fit.

commands:
{commands}

options:
  -h, --help     show this help; `lit-prune COMMAND --help` lists a command's options
  --version      show the version

Shipped configurations, by name: {configs}.
Results go to --trainer.default_root_dir DIR, ./lit-prune-run when it is not given.

examples:
  lit-prune fit --config fasp --model.pretrained HuggingFaceTB/SmolLM2-135M --data.train my.txt \\
      --trainer.default_root_dir runs/smaller
  lit-prune inspect HuggingFaceTB/SmolLM2-135M
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lit-prune`.

    Args:
        argv: The arguments after the program's name; the process's own by default.

    Returns:
        The exit code: 0, 2 for a mistake in what was asked, 130 when interrupted, 1 for a bug.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0
    if args[0] == "--version":
        from lit_prune import __version__

        sys.stdout.write(f"lit-prune {__version__}\n")
        return 0
    if args[0] not in COMMANDS:
        return _refuse(_unknown_command(args[0]))
    args, problem = replace_config_names(args)
    return _refuse(problem) if problem else _dispatch(args[0], args[1:])


def help_text() -> str:
    """Build what `lit-prune --help` prints."""
    commands = "\n".join(f"  {name:<15} {line}" for name, line in COMMANDS.items())
    return _HELP.format(commands=commands, configs=", ".join(shipped_configs()) or "none")


def shipped_configs() -> dict[str, Path]:
    """Find the configurations that come with the package.

    Returns:
        Their paths by name.
    """
    folder = Path(__file__).resolve().parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def replace_config_names(args: list[str]) -> tuple[list[str], str | None]:
    """Replace names of shipped configurations by their paths.

    Args:
        args: The command and its arguments.

    Returns:
        The new arguments, and what is wrong with them or None.
    """
    result, is_value = [], False
    for arg in args:
        flag, equals, name = arg.partition("=")
        if is_value:
            flag, equals, name = "", "", arg
        elif not (equals and flag in ("--config", "-c")):
            is_value = arg in ("--config", "-c")
            result.append(arg)
            continue
        path, is_value = _config_path(name), False
        if path is None:
            shipped = ", ".join(shipped_configs()) or "none"
            return args, f"expected a file or a shipped configuration ({shipped}), got '{name}'"
        result.append(f"{flag}{equals}{path}")
    return result, None


def _config_path(name: str) -> str | None:
    if Path(name).is_file() or "\n" in name or name.lstrip().startswith("{"):
        return name  # a file, or a configuration written out in place
    shipped = shipped_configs().get(name)
    return None if shipped is None else str(shipped)


def _unknown_command(name: str) -> str:
    import difflib

    if name.startswith("-"):
        return f"expected a command ({', '.join(COMMANDS)}) before options, got '{name}'"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "see lit-prune --help"
    return f"expected a command ({', '.join(COMMANDS)}), got '{name}': {hint}"


def _refuse(message: str) -> int:
    sys.stderr.write(f"lit-prune: error: {message}\n")
    return 2


def _set_environment() -> None:
    """Quiet the libraries; read by them when they are imported."""
    # Threads that spin while they wait take the cores from whoever else has work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # their bars would be lines in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


def _dispatch(command: str, args: list[str]) -> int:
    _set_environment()
    if command in _FUNCTIONS:
        from lit_prune.cli.functions import run_command

        module, function = _FUNCTIONS[command]
        return run_command(module, function, args, command)

    from lit_prune.cli.guard import guarded

    def action() -> None:
        if command in _TRAINER_COMMANDS:
            from lit_prune.cli.main import run

            run([command, *args])
        else:
            from lit_prune.cli.streaming import run_streaming

            run_streaming(args)

    return guarded(action, resumes=command == "fit")
