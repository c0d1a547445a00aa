"""The page in a browser: see scripts/check_report.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_prune.reporting.html import render
from tests.reporting.made import full_report

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_report.py"


def check(*arguments: object) -> Any:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_page_that_is_not_there_is_refused(tmp_path: Path):
    done = check(tmp_path / "none.html")
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a page, got")


@pytest.mark.slow
def test_a_report_can_be_read_and_faults_are_found(tmp_path: Path):
    good, bad = tmp_path / "good.html", tmp_path / "bad.html"
    text = render(full_report())
    good.write_text(text, encoding="utf-8")
    wide = "<div class='card' style='width: 200px'><p style='width: 2000px'>wide</p></div>"
    more = f"{wide}<img src='http://localhost/x.png'><script>console.log('hello')</script></main>"
    bad.write_text(text.replace("</main>", more), encoding="utf-8")
    done = check(good, "--out", tmp_path / "shots")
    if done.returncode == 2 and "expected a browser" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout.count("fine")) == (0, 4), done.stdout
    assert len(list((tmp_path / "shots").glob("*.png"))) == 4
    done = check(bad)
    assert done.returncode == 1
    for fault in ("scrolls sideways", "asks for http://localhost", "console: hello", "sticks out"):
        assert fault in done.stdout
