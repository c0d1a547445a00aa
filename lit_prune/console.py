"""Where tables are printed."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class PatientConsole(Console):
    """Goes on in silence where nobody reads any more; rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Throw away what is printed from now on, as after `| head`."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stdout_console(width: int | None = None) -> Console:
    """The console on stdout.

    Args:
        width: Of tables where there is no terminal; rich's own by default.
    """
    found = PatientConsole()
    return found if width is None or found.is_terminal else PatientConsole(width=width)
