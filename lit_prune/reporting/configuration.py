"""The configuration that a report shows: without local paths and secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_prune.reporting.card import public

#: Names of options such as a logger's `api_key`.
_SECRET = re.compile(r"(^|_)(key|token|secret|password)$", re.IGNORECASE)


def run_config(trainer: Trainer) -> Any:
    """The configuration that the command line wrote into the run's folder, or None.

    Another file of that name, in a fit that no command line started, is left alone.

    Args:
        trainer: The trainer.

    Returns:
        Plain types; of local paths the last component only.
    """
    callbacks: Any = getattr(trainer, "callbacks", [])
    for callback in callbacks:
        if isinstance(callback, SaveConfigCallback):
            path = Path(trainer.default_root_dir) / callback.config_filename
            if path.is_file():
                return public(_hidden(yaml.safe_load(path.read_text(encoding="utf-8"))))
    return None


def _hidden(value: Any) -> Any:
    """The same with texts that are secrets by their names left out."""
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if isinstance(part, str) and _SECRET.search(str(key)) else _hidden(part)
            for key, part in value.items()
        }
    return [_hidden(part) for part in value] if isinstance(value, list) else value
