"""Safetensors files, read and written piece by piece."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_prune.errors import UserError
from lit_prune.streaming.shards import INDEX_FILE, ShardReader, ShardWriter


def write(folder: Path) -> dict[str, torch.Tensor]:
    """Three tensors in two files."""
    tensors = {name: torch.randn(3, 4).to(torch.bfloat16) for name in "ab"}
    tensors["c"] = torch.randn(4, 3).T[1:]  # not contiguous
    writer = ShardWriter(folder)
    writer.add({name: tensors[name] for name in "ab"})
    writer.add({"c": tensors["c"]})
    writer.finish()
    return tensors


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    reader = ShardReader(tmp_path)
    assert reader.headers() == {"a": ((3, 4), "BF16"), "b": ((3, 4), "BF16"), "c": ((2, 4), "F32")}
    assert torch.equal(reader.read(["c"], torch.float32)["c"], tensors["c"])
    read = reader.read("cab", torch.float64)
    assert all(torch.equal(read[name], tensors[name].double()) for name in "abc")


def test_names_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, INDEX_FILE])
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["weight_map"] == {"a": files[0], "b": files[0], "c": files[1]}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"] == {"total_parameters": 32, "total_size": size}
    assert load_file(tmp_path / files[0]).keys() == {"a", "b"}


def test_what_was_read_is_not_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    reader = ShardReader(tmp_path)
    reader.read(["a"], torch.bfloat16)["a"].zero_()
    assert reader.read(["a"], torch.bfloat16)["a"].abs().sum() > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"weight_map": {"a": "b.safetensors"}}', "expected b.safetensors in"),
        ("[]", "expected the index of a checkpoint"),
        ('{"weight_map": {"z": "model-00001-of-00002.safetensors"}}', "whole safetensors files"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, content: str, words: str) -> None:
    write(tmp_path)
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        ShardReader(tmp_path).headers()
    assert "\n" not in str(caught.value)
