"""Which checkpoint of a run is read without a trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prune.cli.checkpoints import find_checkpoint
from lit_prune.errors import UserError
from lit_prune.fitting.restore import last_checkpoint


def write(run: Path, name: str, step: int, age: float = 0.0, **more: Any) -> Path:
    path = run / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    ours = {"lit_prune": {}, "state_dict": {}, "global_step": step}
    torch.save({**ours, "pytorch-lightning_version": "2.6.6", **more}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_it_is_the_one_that_a_fit_goes_on_from(tmp_path: Path) -> None:
    # a fit that went on from step 3 with other options, after one that had come to step 9
    write(tmp_path, "step=9.ckpt", 9, age=50)
    write(tmp_path, "last-v1.ckpt", 8, age=40)
    last = write(tmp_path, "last.ckpt", 5)
    write(tmp_path, "step=5.ckpt", 5, age=-10)
    told: list[str] = []
    path, checkpoint = last_checkpoint(tmp_path, told.append)
    assert (path, checkpoint["global_step"]) == (last, 5)
    assert told == [f"reading {last}, after step 5"]
    assert str(path) == find_checkpoint(tmp_path, "last")[0]


def test_a_link_to_nothing_is_passed_over(tmp_path: Path) -> None:
    before = write(tmp_path, "previous.ckpt", 4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.symlink_to(tmp_path / "gone.ckpt")
    told: list[str] = []
    assert last_checkpoint(tmp_path, told.append)[0] == before
    assert told == [
        f"{last} cannot be read (No such file or directory)",
        f"reading {before}, after step 4",
    ]


def test_what_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a whole checkpoint in .*/checkpoints, got none"):
        last_checkpoint(tmp_path, print)
    last = write(tmp_path, "last.ckpt", 1, more=Path())
    with pytest.raises(UserError, match=r"plain types in .*last\.ckpt, got ") as caught:
        last_checkpoint(tmp_path, print)
    assert "\n" not in str(caught.value)
    content = torch.load(last, weights_only=False)
    torch.save({k: v for k, v in content.items() if k not in ("lit_prune", "more")}, last)
    with pytest.raises(UserError, match=r"checkpoint of lit-prune, got .*last.ckpt of another"):
        last_checkpoint(tmp_path, print)
