"""The package's top: light, lazy, and complete."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lit_prune


def test_importing_is_light() -> None:
    code = "import sys, lit_prune; sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", [name for name in lit_prune.__all__ if name != "__version__"])
def test_public_names_load(name: str) -> None:
    assert getattr(lit_prune, name).__name__ == name
    assert name in dir(lit_prune)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lit_prune.nothing
