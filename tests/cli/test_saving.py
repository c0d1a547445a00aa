"""Files appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_prune.cli.saving import AtomicCheckpointIO, RunConfigCallback, atomic_write
from lit_prune.errors import UserError


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write(b"new" + "text")  # pyright: ignore[reportOperatorIssue]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"weight": torch.arange(3.0), "step": 2}, path)
    loaded = plugin.load_checkpoint(path, weights_only=True)
    assert loaded["step"] == 2
    assert torch.equal(loaded["weight"], torch.arange(3.0))
    assert [child.name for child in path.parent.iterdir()] == ["last.ckpt"]


def test_the_checkpoint_before_the_last_is_kept(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO()
    for step in (1, 2, 3):
        plugin.save_checkpoint({"step": step}, tmp_path / "last.ckpt")
        plugin.save_checkpoint({"step": step}, tmp_path / "other.ckpt")
    found = {path.name: torch.load(path, weights_only=True)["step"] for path in tmp_path.iterdir()}
    assert found == {"last.ckpt": 3, "previous.ckpt": 2, "other.ckpt": 3}


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space.*last\.ckpt"):
        plugin.save_checkpoint({"step": 2}, path)
    assert plugin.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [child.name for child in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("own", "other", "words"),
    [
        (None, "/b/last.ckpt", r"got none on rank 0, last\.ckpt on rank 1: give"),
        ("/a/last.ckpt", "/a/previous.ckpt", r"last\.ckpt on rank 0, previous\.ckpt on rank 1"),
        ("/a/last.ckpt", "/b/last.ckpt", None),
        (None, None, None),
    ],
)
def test_processes_start_from_the_same_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    other: str | None,
    words: str | None,
) -> None:
    def gather(found: list[Any], mine: Any) -> None:
        found[:] = [mine, other and Path(other).name]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    written: list[str] = []
    monkeypatch.setattr(RunConfigCallback.__base__, "setup", lambda *_: written.append("config"))
    config, parser = Namespace(ckpt_path=own), LightningArgumentParser()
    callback = RunConfigCallback(parser, config)
    trainer: Any = SimpleNamespace(world_size=2, ckpt_path=None)  # not known yet
    if words is None:
        callback.setup(trainer, None, "fit")  # pyright: ignore[reportArgumentType]
        # of a resumed fit once its checkpoint is taken
        assert written == ([] if own else ["config"])
        callback.on_fit_start(trainer, None)  # pyright: ignore[reportArgumentType]
        assert set(written) == {"config"}
    else:
        with pytest.raises(UserError, match=words):
            callback.setup(trainer, None, "fit")  # pyright: ignore[reportArgumentType]
        assert written == []
