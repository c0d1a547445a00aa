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

#: Names of options such as a logger's `api_key`, but not `tokenizer` or `author`.
_SECRET = re.compile(
    r"api_?key|(^|[_-])key$|token(?!iz)|secret|passw|auth(?!or(?!i[sz]))|credential", re.IGNORECASE
)
_LOGIN = re.compile(r"(?<=://)[^/\s?#]*@")  # a user's name and password in an address


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
                return public(without_secrets(yaml.safe_load(path.read_text(encoding="utf-8"))))
    return None


def without_secrets(value: Any) -> Any:
    """The same without what is secret by its name, and without logins in addresses.

    Args:
        value: Nested plain types.
    """
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if _is_secret(str(key), part) else without_secrets(part)
            for key, part in value.items()
        }
    if isinstance(value, str):
        return _LOGIN.sub("", value)
    return [without_secrets(part) for part in value] if isinstance(value, list) else value


def _is_secret(name: str, value: Any) -> bool:
    """By its name; numbers such as `max_tokens` are none."""
    return bool(value) and not isinstance(value, (int, float)) and bool(_SECRET.search(name))
