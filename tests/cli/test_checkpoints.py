"""Damaged checkpoints are found, and the newest whole one is taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lit_prune.cli.checkpoints import find_checkpoint, unfit
from lit_prune.errors import UserError

_LIGHTNINGS = {"state_dict": {}, "global_step": 3, "pytorch-lightning_version": "2.6.6"}


def save(path: Path, when: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.arange(5000.0), **_LIGHTNINGS}, path)
    os.utime(path, (when, when))
    return path


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def test_a_whole_checkpoint_has_no_unfit(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt")
    assert unfit(path) is None
    assert find_checkpoint(tmp_path, str(path)) == (str(path), [])


def test_a_sharded_checkpoint_ends_with_its_metadata(tmp_path: Path) -> None:
    assert unfit(tmp_path) == "is not complete"
    (tmp_path / "meta.pt").write_bytes(b"")
    assert unfit(tmp_path) is None


@pytest.mark.parametrize("size", [0, 10, 500, 10_000, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, size: int) -> None:
    path = save(tmp_path / "x.ckpt")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"x\.ckpt, which is truncated or no checkpoint \(.*give"):
        find_checkpoint(tmp_path, str(path))


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt")
    flip(path, path.stat().st_size // 2)
    torch.load(path, weights_only=True)  # which torch does not see
    with pytest.raises(UserError, match=r"x\.ckpt, which is damaged \(wrong checksum of .*data/0"):
        find_checkpoint(tmp_path, str(path))


@pytest.mark.parametrize("place", [1, 30, -10, -40, -100])
def test_a_flipped_bit_elsewhere_does_no_harm(tmp_path: Path, place: int) -> None:
    """Found, or in bytes that nobody reads; never an error of Python's."""
    path = save(tmp_path / "x.ckpt")
    flip(path, place)
    if unfit(path) is None:
        assert torch.load(path, weights_only=True)["weight"].equal(torch.arange(5000.0))


def test_a_flipped_bit_anywhere_is_found_or_does_no_harm(tmp_path: Path) -> None:
    """In names, too, which Python decodes, and in what only torch's reader minds."""
    path = tmp_path / "x.ckpt"
    torch.save(_LIGHTNINGS, path)
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (1, 64):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            if unfit(path) is None:
                assert torch.load(path, weights_only=True) == _LIGHTNINGS


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.symlink_to("gone.ckpt")
    assert unfit(path) == "cannot be read (No such file or directory)"


def test_more_than_weights_is_no_unfit(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"weight": torch.arange(3.0), "made": UserError("x")}, path)
    assert unfit(path) is None


@pytest.mark.parametrize("error", [RuntimeError("unable to mmap 3 bytes"), MemoryError()])
def test_too_little_memory_is_no_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    path = save(tmp_path / "x.ckpt")
    monkeypatch.setattr("torch.load", load)
    assert unfit(path) is None


@pytest.mark.parametrize("content", [{"weight": torch.ones(3)}, [1, 2], torch.ones(3)])
def test_a_whole_file_of_something_else_is_passed_over(tmp_path: Path, content: object) -> None:
    other = tmp_path / "checkpoints/last.ckpt"
    before = save(other.with_name("previous.ckpt"))
    torch.save(content, other)
    assert unfit(other) == "is no Lightning checkpoint"
    with pytest.raises(UserError, match=r"last\.ckpt, which is no Lightning checkpoint: give"):
        find_checkpoint(tmp_path, str(other))
    assert find_checkpoint(tmp_path, "last") == (
        str(before),
        [f"{other} is no Lightning checkpoint"],
    )


def test_last_is_the_newest_of_the_last_ones(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert find_checkpoint(tmp_path, "last") == (None, [])
    save(folder / "step=9.ckpt", when=9)
    save(folder / "previous.ckpt", when=3)
    (folder / ".last.ckpt.tmp3").write_text("")
    assert find_checkpoint(tmp_path, "last")[0] == str(folder / "step=9.ckpt")
    save(folder / "last.ckpt", when=4)
    assert find_checkpoint(tmp_path, "last")[0] == str(folder / "last.ckpt")
    save(folder / "last-v1.ckpt", when=5)
    assert find_checkpoint(tmp_path, "last")[0] == str(folder / "last-v1.ckpt")


def test_last_may_lie_in_a_subfolder(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints/epoch=1/step=3.ckpt")
    save(tmp_path / "checkpoints/.trash/last.ckpt", when=9)
    assert find_checkpoint(tmp_path, "last") == (str(path), [])


def test_last_falls_back(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for when, name in enumerate(("previous.ckpt", "step=5.ckpt", "last.ckpt")):
        save(folder / name, when)
    flip(folder / "last.ckpt", 9000)
    found, passed = find_checkpoint(tmp_path, "last")
    assert found == str(folder / "step=5.ckpt")
    assert len(passed) == 1
    assert passed[0].startswith(f"{folder}/last.ckpt is damaged")
    (folder / "step=5.ckpt").write_bytes(b"")
    found, passed = find_checkpoint(tmp_path, "last")
    assert found == str(folder / "previous.ckpt")
    assert len(passed) == 2


@pytest.mark.parametrize("wanted", ["https://x.org/x.ckpt", "http://x/x", "s3://bucket/x.ckpt"])
def test_an_address_is_refused(tmp_path: Path, wanted: str) -> None:
    """Lightning would unpickle whatever it gets from there."""
    with pytest.raises(UserError, match=f"got the address {wanted}: download it"):
        find_checkpoint(tmp_path, wanted)


@pytest.mark.parametrize("wanted", ["best", "hpc", "registry:x", "no.ckpt"])
def test_words_of_lightnings_are_no_files(tmp_path: Path, wanted: str) -> None:
    assert find_checkpoint(tmp_path, None) == (None, [])
    with pytest.raises(UserError, match=f"got {wanted}, which does not exist: .*or 'last' for"):
        find_checkpoint(tmp_path, wanted)


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = save(tmp_path / "x.ckpt")
    assert find_checkpoint(tmp_path, "~/x.ckpt") == (str(path), [])
