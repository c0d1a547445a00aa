"""Pages of one file from the templates beside this module."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lit_prune.files import file_written_at_once


def fill(template: str, content: dict[str, Any]) -> str:
    """A template with its content, which is escaped.

    Args:
        template: Its file's name.
        content: What it names.
    """
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def write(text: str, path: str | Path) -> None:
    """Write a page at once.

    Args:
        text: The page.
        path: The file; its folder exists or is made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_written_at_once(target) as file:
        file.write_bytes(text.encode("utf-8"))


def _read(name: str) -> str:
    return files("lit_prune.reporting").joinpath(name).read_text(encoding="utf-8")
