"""See scripts/bench_texts.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_rare_words_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_texts import main  # pyright: ignore[reportMissingImports]

    made = tmp_path / "made"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "wikitext2-train-head.txt").write_text(" a b\n a c")
    (tmp_path / "text" / "wikitext2-test.txt").write_text("a  b b\n")
    monkeypatch.setattr(sys, "argv", ["x", "--data", str(tmp_path), "--out", str(made)])
    assert main() == 0
    assert (made / "text" / "wikitext2-train-head.txt").read_text() == " a b\n a <unk>"
    assert (made / "text" / "wikitext2-test.txt").read_text() == "a  b b\n"
    (tmp_path / "text" / "wikitext2-test.txt").unlink()
    assert main() == 2
