"""Progress bars for work that is not the Trainer's."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any


def track(items: Iterable[Any], text: str, shown: bool = True) -> Iterator[Any]:
    """Yield items under a progress bar on stderr; without a terminal, a line when it ends.

    Args:
        items: What to go through; a bar needs its length.
        text: What is being done.
        shown: Whether to show anything, such as on the first rank only.
    """
    total = len(items) if isinstance(items, Sized) else None
    if not shown:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, description=text, total=total, console=Console(stderr=True))
    else:
        start = time.perf_counter()
        print(f"{text} …", file=sys.stderr, flush=True)
        yield from items
        print(f"{text}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
