"""Records that later measurements add to, on figures made up."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.errors import UserError
from lit_prune.evaluation.record import added, check_writable, fingerprint, write_record


def entry(digest: str, *, speed: Any = None, **changes: Any) -> dict[str, Any]:
    return {"digest": digest, "perplexity": [], "tasks": None, "speed": speed, **changes}


def record(model: Any, dense: Any = None, warnings: Any = ()) -> dict[str, Any]:
    return {"model": model, "dense": dense, "versions": {}, "warnings": list(warnings)}


def test_speeds_stay_with_the_dense_model_that_they_were_timed_with() -> None:
    before = record(entry("m", speed="fast"), entry("d", speed="slow"))
    same = added(record(entry("m"), entry("d")), before)
    assert (same["model"]["speed"], same["dense"]["speed"]) == ("fast", "slow")
    alone = added(record(entry("m")), before)
    assert (alone["model"]["speed"], alone["dense"]["speed"]) == ("fast", "slow")
    other = added(record(entry("m"), entry("other")), before)
    assert (other["model"]["speed"], other["dense"]["speed"]) == (None, None)
    anew = added(record(entry("m", speed="new")), before)
    assert (anew["model"]["speed"], anew["dense"]["speed"]) == ("new", None)
    assert before["dense"]["speed"] == "slow"  # what is on the disk is not changed


def test_models_are_told_apart_by_their_files() -> None:
    before = record(entry("as float32", files="f", tasks={"acc": 1}), warnings=["old"])
    found = added(record(entry("as float16", files="f"), warnings=["new"]), before)
    assert found["model"]["tasks"] == {"acc": 1}
    assert found["warnings"] == ["old", "new"]
    other = added(record(entry("as float32", files="g")), before)
    assert other["model"]["tasks"] is None
    assert "are replaced" in other["warnings"][0]


def test_fingerprint_of_weights(tmp_path: Path) -> None:
    assert fingerprint(tmp_path) is None
    weights = {"a": torch.arange(100.0), "b": torch.ones(3, 4)}
    found = []
    for changes in ({}, {}, {"b": torch.zeros(3, 4)}, {"a": torch.arange(99.0)}):
        save_file({**weights, **changes}, tmp_path / "model.safetensors")
        found.append(fingerprint(tmp_path))
    assert found[0] == found[1]
    assert len({*found, None}) == 4
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{")
    assert fingerprint(tmp_path) is None


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new/file.json")
    assert not list((tmp_path / "new").iterdir())
    write_record({"a": 1}, tmp_path / "new/file.json")
    assert json.loads((tmp_path / "new/file.json").read_text()) == {"a": 1}
    with pytest.raises(UserError, match="got the folder"):
        check_writable(tmp_path)
    for path in (Path("/proc/x/y.json"), tmp_path / "new/file.json/x"):
        with pytest.raises(UserError, match="that can be written"):
            check_writable(path)
