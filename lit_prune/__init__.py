"""Structured pruning of language models inside one PyTorch Lightning fit.

The names below are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_prune.data import TextDataModule
    from lit_prune.export import load_pruned
    from lit_prune.module import PrunableLM
    from lit_prune.prunable import Prunable
    from lit_prune.structure import Layout, Structure

__version__ = "0.1.0"

__all__ = [
    "Layout",
    "Prunable",
    "PrunableLM",
    "Structure",
    "TextDataModule",
    "__version__",
    "load_pruned",
]

_HOME = {
    "Layout": "lit_prune.structure",
    "Prunable": "lit_prune.prunable",
    "PrunableLM": "lit_prune.module",
    "Structure": "lit_prune.structure",
    "TextDataModule": "lit_prune.data",
    "load_pruned": "lit_prune.export",
}

# peft imports bitsandbytes where there is one, which warns of a kernel that it would download
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
