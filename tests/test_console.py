"""A reader that has enough does not end the work."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, sys
from lit_prune.console import stdout_console
console = stdout_console(40)
os.close(0)
for number in range(20_000):
    console.print(f"line {number}")
sys.stderr.write("went on")
"""


def test_work_goes_on_when_nobody_reads() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr.read() == b"went on"
    assert process.wait() == 0
