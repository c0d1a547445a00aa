"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_LARGE = 2**17  # glibc's at the start, before it raises it


def keep_large_blocks_apart() -> None:
    """Let the C library give large blocks back as soon as they are freed, from now on.

    glibc keeps ever larger freed blocks on its heap, which then grows by fragments while tensors
    of changing sizes come and go. Other systems' libraries are left as they are.
    """
    _call("mallopt", _MMAP_THRESHOLD, _LARGE)


def give_back() -> None:
    """Give back what lies freed on the heap, where the C library can."""
    _call("malloc_trim", 0)


def _call(name: str, *values: int) -> None:
    library: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    function = getattr(library, name, None)
    if function is not None:
        function(*values)
