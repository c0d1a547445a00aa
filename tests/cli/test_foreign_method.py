"""Methods of other packages, named by class_path in a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_prune import load_pruned
from lit_prune.cli.front import main
from tests.cli.conftest import Workspace


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DeviationPruning", {"power": 2.0, "sparsity": 0.2, "samples": 4, "length": 8}),
        ("OneCut", {"sparsity": 0.2}),
    ],
)
def test_a_method_of_another_package(
    workspace: Workspace, tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    path = Path(workspace.config(tmp_path / "x.yaml", without=("FASPPruning",)))
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    entry = {"class_path": f"tests.foreign_method.{name}", "init_args": arguments}
    config["trainer"]["callbacks"].insert(1, entry)
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    run = tmp_path / "run"
    assert main(["fit", "--config", str(path), "--trainer.default_root_dir", str(run)]) == 0
    model = load_pruned(run / "pruned")
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    left = sum(parameter.numel() for parameter in model.parameters())
    assert left == report["models"]["recovered"]["parameters"]
    assert left < report["models"]["dense"]["parameters"]
    if name == "DeviationPruning":
        assert report["method"] == "deviation"
        assert report["sparsity"]["decoder"] == pytest.approx(0.2, abs=0.01)
