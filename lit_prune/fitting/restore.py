"""A module as a Lightning checkpoint of its run left it, without a trainer."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_prune.cli.checkpoints import FOLDER, find_checkpoint
from lit_prune.errors import UserError
from lit_prune.module import PrunableLM


def restore(run: str | Path, say: Callable[[str], None], **changes: Any) -> tuple[PrunableLM, int]:
    """Build the module of a run from its `config.yaml` and its last whole checkpoint.

    Nothing in the run's folder is run as code: of the configuration only the arguments of
    `PrunableLM` are read, and the checkpoint is loaded as plain types and tensors.

    Args:
        run: The run's folder.
        say: Told in one line which checkpoint it is, and of each that is passed over.
        changes: Arguments of `PrunableLM` in place of the run's own.

    Returns:
        The module, its adapter attached if it has one, and the optimizer steps it has seen.

    Raises:
        UserError: There is no run, no whole checkpoint, or they don't belong together.
    """
    folder = Path(run)
    options = {**model_options(folder), **changes}
    path, checkpoint = last_checkpoint(folder, say)
    module = PrunableLM(**options)
    module.configure_model()
    try:
        if adapter := checkpoint["lit_prune"]["adapter"]:
            adapter["base"] = "dense"  # as the weights are saved; nothing is trained here
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=True)
    except KeyError as error:
        raise UserError(
            f"expected a checkpoint of this version of lit-prune, got {path} without {error}; "
            "export it with the version that wrote it"
        ) from error
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"expected weights of {module.pretrained} in {path}, got others ({first}); is "
            "the checkpoint of this run?"
        ) from error
    return module.eval(), checkpoint["global_step"]


def model_options(run: Path) -> dict[str, Any]:
    """The arguments of `PrunableLM` that a run's `config.yaml` holds.

    Args:
        run: The run's folder.

    Raises:
        UserError: There is none, or none that can be read.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"expected a run's folder with a config.yaml, got {run}; give the "
            "--trainer.default_root_dir of the fit"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"expected the configuration of a run in {path}, got {first}") from error
    options = content.get("model") if isinstance(content, dict) else None
    known = inspect.signature(PrunableLM).parameters
    if not isinstance(options, dict) or "pretrained" not in options:
        raise UserError(f"expected a section 'model' with 'pretrained' in {path}, got none")
    if unknown := sorted(options.keys() - known.keys()):
        raise UserError(
            f"expected arguments of PrunableLM under 'model' in {path}, got {', '.join(unknown)}"
        )
    return options


def last_checkpoint(run: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Read the checkpoint that a fit goes on from with ``--ckpt_path last``.

    Args:
        run: The run's folder.
        say: Told in one line which it is, and of each that is passed over.

    Returns:
        The file, and what it holds; tensors stay on disk until they are used.

    Raises:
        UserError: There is none, or it is none of lit-prune.
    """
    found, passed = find_checkpoint(run, "last")
    for line in passed:
        say(line)
    if found is None:
        raise UserError(
            f"expected a whole checkpoint in {run / FOLDER}, got none; let the run go on to its "
            "first one"
        )
    try:
        checkpoint = torch.load(found, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"expected a whole checkpoint of tensors and plain types in {found}, got {first}"
        ) from error
    if "lit_prune" not in checkpoint:
        raise UserError(f"expected a checkpoint of lit-prune, got {found} of another module")
    say(f"reading {found}, after step {checkpoint['global_step']}")
    return Path(found), checkpoint
