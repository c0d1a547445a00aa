"""Who imports whom, read from the source; and annotations that the command line can resolve."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import lit_prune

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = [
    path
    for path in sorted((_ROOT / "lit_prune").rglob("*.py"))
    if path.relative_to(_ROOT / "lit_prune").parts[0] not in ("callbacks", "configs")
]
_CALLBACKS = sorted((_ROOT / "callbacks").rglob("*.py"))


def imports(source: str, package: str) -> Iterator[str]:
    """The absolute dotted name of everything that a module imports, at any depth of its code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def modules() -> list[str]:
    found = pkgutil.walk_packages(lit_prune.__path__, "lit_prune.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


def name_of(path: Path) -> str:
    return str(path.relative_to(_ROOT))


def test_imports_are_read() -> None:
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom .f import g\nfrom .. import h\n"
        "def late():\n    from lit_prune import callbacks\n"
    )
    assert list(imports(source, "p.q")) == [
        *("a.b", "c.d", "p.q.e", "p.q.f.g", "p.h", "lit_prune.callbacks")
    ]


@pytest.mark.parametrize("path", _PACKAGE, ids=name_of)
def test_the_package_never_imports_callbacks(path: Path) -> None:
    package = ".".join(path.relative_to(_ROOT).parent.parts)
    names = imports(path.read_text(encoding="utf-8"), package)
    assert not [name for name in names if within(name, "lit_prune.callbacks")]


@pytest.mark.parametrize(
    "path", sorted((_ROOT / "lit_prune" / "structure").glob("*.py")), ids=name_of
)
def test_the_structure_imports_nothing_above_it(path: Path) -> None:
    below = ("structure", "errors", "modes", "export.modeling_lit_pruned", "export.trial")
    for name in imports(path.read_text(encoding="utf-8"), "lit_prune.structure"):
        if within(name, "lit_prune"):
            assert any(within(name, f"lit_prune.{part}") for part in below), name


@pytest.mark.parametrize("path", _CALLBACKS, ids=name_of)
def test_callbacks_never_import_each_other(path: Path) -> None:
    if path.name == "__init__.py":
        return
    names = imports(path.read_text(encoding="utf-8"), "lit_prune.callbacks")
    assert not [name for name in names if within(name, "lit_prune.callbacks")]
    assert not [name for name in names if within(name, "callbacks")]


@pytest.mark.parametrize("module", modules())
def test_annotations_of_public_classes_resolve(module: str) -> None:
    # jsonargparse ignores an annotation that it can't resolve, without a word
    for name, cls in vars(importlib.import_module(module)).items():
        if name.startswith("_") or not inspect.isclass(cls) or cls.__module__ != module:
            continue
        inspect.get_annotations(cls, eval_str=True)
        if "__init__" in vars(cls):
            typing.get_type_hints(cls.__init__)


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    folders = {path.parent.relative_to(_ROOT) for path in _PACKAGE}
    for folder in folders:
        assert f'    "{".".join(folder.parts)}",\n' in listed
