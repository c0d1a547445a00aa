"""What a wheel holds, and that it works from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
_CHECK = """
import importlib.resources, sys
import lit_prune.callbacks
assert lit_prune.__file__.startswith(sys.argv[1]), lit_prune.__file__
assert lit_prune.callbacks.__file__.startswith(sys.argv[1]), lit_prune.callbacks.__file__
folder = importlib.resources.files("lit_prune.configs")
print(*sorted(path.name for path in folder.iterdir() if path.name.endswith(".yaml")))
from lit_prune.cli.front import replace_config_names, shipped_configs
for name, path in shipped_configs().items():
    assert replace_config_names(["fit", "--config", name]) == (["fit", "--config", str(path)], None)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("through_sdist", [False, True])
def test_a_wheel_is_complete_and_works_elsewhere(tmp_path: Path, through_sdist: bool) -> None:
    source = tmp_path / "source"  # a copy: building writes beside the source
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for name in filter(None, listed):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (_ROOT / name).is_symlink():
            target.symlink_to((_ROOT / name).readlink())
        else:
            target.write_bytes((_ROOT / name).read_bytes())

    dist, site = tmp_path / "dist", tmp_path / "site"
    dist.mkdir()
    what = source
    if through_sdist:
        build = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
        run("-c", build, dist, cwd=source)
        what = next(dist.glob("*.tar.gz"))
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", dist, what, cwd=tmp_path)
    wheel = next(dist.glob("*.whl"))
    run(*pip, "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)

    code = f"import sys; sys.path.insert(0, sys.argv[1])\n{_CHECK}"
    configs = sorted(path.name for path in (_ROOT / "configs").glob("*.yaml"))
    assert run("-c", code, site, cwd=tmp_path).split() == configs

    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(_ROOT)) for path in (_ROOT / "lit_prune").rglob("*.py")} | {
        f"lit_prune/{path.relative_to(_ROOT)}" for path in (_ROOT / "callbacks").rglob("*.py")
    }
    assert modules <= names
    assert "lit_prune/py.typed" in names
    assert not [name for name in names if name.startswith(("callbacks/", "configs/", "tests/"))]
