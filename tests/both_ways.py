"""Pruning both ways: from files to files, and in memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.export.describe import card_of
from lit_prune.streaming.prune import prune_streaming
from tests.tiny_fit import make_data, make_trainer

#: Rows of the table that need more than one layer at a time, and a word of the reason.
REFUSED = {
    "fasp-sensitivity": "sensitivity",
    "fasp-iterative": "iterations",
    "taylor": "loss",
    "fisher": "loss",
    "fusion": "loss",
    "cce": "loss",
    "cce-lora": "loss",
    "vib": "loss",
    "vib-aligned": "loss",
    "mini-llm": "loss",
}
SMALL: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2}


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def others(folder: Path) -> dict[str, bytes]:
    """Every file but the weights and their index.

    The digest of the base is left out: one that is never whole in memory has none.
    """
    found = {p.name: p.read_bytes() for p in folder.iterdir() if ".safetensors" not in p.name}
    found["lit_prune.json"] = re.sub(rb'"base_digest": [^\n]*', b"", found["lit_prune.json"])
    return found


def in_memory(source: str, callback: Any, out: Path, **options: Any) -> Path:
    module = PrunableLM(source, **options)
    trainer = make_trainer(out.parent, [callback], max_steps=0)
    trainer.fit(module, datamodule=make_data(out.parent / "text"))
    module.finish()
    module.export(out, card_of(module, out.name))
    return out


def streamed(source: str, callback: Any, out: Path, **options: Any) -> Path:
    data = make_data(out.parent / "text")
    prune_streaming(PrunableLM(source, **options), callback, data, out, shown=False)
    return out


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert others(one) == others(other)


def assert_same_as_in_memory(tmp_path: Path, source: str, make: Any, **options: Any) -> Path:
    """Both ways give the same files; the folder of the streamed one."""
    out = tmp_path / "a" / "out"
    assert_equal(
        streamed(source, make(), out, **options),
        in_memory(source, make(), tmp_path / "b" / "out", **options),
    )
    return out
