"""Options of the trainer's commands, looked at before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from pydoc import locate
from typing import Any

from lit_prune.cli.checkpoints import find_checkpoint
from lit_prune.cli.guard import say
from lit_prune.errors import UserError


def list_callbacks(config: Any) -> None:
    """Have the trainer's callbacks in a list, which a single one needs not be in.

    Args:
        config: The parsed arguments of a command.
    """
    given = config.trainer.callbacks
    if given is not None and not isinstance(given, list):
        config.trainer.callbacks = [given]


def check_numbers(config: Any) -> None:
    """Refuse what the libraries answer with a traceback.

    Args:
        config: The parsed arguments of a command.

    Raises:
        UserError: A number is out of range.
    """
    seed, accumulated = config.seed_everything, config.trainer.accumulate_grad_batches
    for name in ("check_val_every_n_epoch", "val_check_interval"):
        value = config.trainer[name]
        if isinstance(value, int | float) and value <= 0:
            raise UserError(f"expected --trainer.{name} above 0, got {value:g}")
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed < 2**32:
        raise UserError(f"expected --seed_everything from 0 to {2**32 - 1}, got {seed}")
    if accumulated < 1:
        raise UserError(
            f"expected --trainer.accumulate_grad_batches of at least 1, got {accumulated}"
        )


def find_for_reading(config: Any) -> None:
    """Resolve the checkpoint that validate, test or predict shall read.

    Args:
        config: The parsed arguments of the command.

    Raises:
        UserError: There is none, or none that is whole.
    """
    folder, wanted = Path(config.trainer.default_root_dir).expanduser(), config.ckpt_path
    config.ckpt_path, passed = find_checkpoint(folder, wanted)
    if passed:
        say(f"{'; '.join(passed)}: reading {config.ckpt_path}")
    if wanted and not config.ckpt_path:
        raise UserError(
            f"expected {folder}/checkpoints/last.ckpt, which does not exist: name the run's folder "
            "with --trainer.default_root_dir"
        )


def set_sparsity(config: Any) -> None:
    """Hand the shorthand's value to the pruning callback.

    Args:
        config: The parsed arguments of a command.

    Raises:
        UserError: There is none, or more than one, or its sparsity would not count.
    """
    callbacks = config.trainer.callbacks or []
    targets = [item for item in callbacks if "sparsity" in (item.get("init_args") or {})]
    if len(targets) != 1:
        raise UserError(
            f"expected one callback that takes a sparsity, got {len(targets)}; name a "
            "configuration that prunes, such as --config fasp, before --sparsity"
        )
    owner: Any = locate(targets[0].class_path)
    instead = getattr(owner, "instead_of_sparsity", lambda options: None)(targets[0].init_args)
    if instead is not None:
        raise UserError(
            f"expected --sparsity or {instead}, which says how much goes in its place, got both; "
            f"leave out --sparsity or set {instead} to null"
        )
    targets[0].init_args.sparsity = config.sparsity
