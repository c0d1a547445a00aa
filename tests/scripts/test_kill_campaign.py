"""A fit that is killed in each of its phases ends as if nothing had happened."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_campaign.py"


@pytest.mark.slow
def test_a_small_campaign(tmp_path: Path) -> None:
    command = [sys.executable, str(_SCRIPT), "--out", str(tmp_path), "--mode", "single", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills in" in done.stdout
