"""Tensors kept on disk under a key: safetensors, written whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_prune.files import file_written_at_once

_log = logging.getLogger(__name__)


def default_cache_dir() -> Path | None:
    """Returns the platform's cache folder for tokens, or None where there is no home."""
    root = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        folder = Path(root) if root else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "lit-prune" / "tokens"


def cached(path: Path | None, build: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Reads tensors from a file, or builds and writes them.

    Args:
        path: The cache file; None builds.
        build: Makes the tensors.

    Returns:
        The tensors. A damaged file is built again; a folder that can't be written is no error.
    """
    if path is None:
        return build()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if (file.metadata() or {}).get("sha256") == _checksum(tensors):
                return tensors
    except (OSError, SafetensorError):
        pass
    tensors = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_written_at_once(path) as file:
            save_file(tensors, file, metadata={"sha256": _checksum(tensors)})
    except (OSError, SafetensorError) as error:
        _log.info("tokens are not cached: %s", error)
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
