"""Streaming stops at once, leaves no half result, and refuses what it can't do in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_prune import load_pruned
from lit_prune.errors import UserError
from tests.both_ways import REFUSED, SMALL, streamed, weights
from tests.foreign_method import DeviationPruning
from tests.method_table import METHODS
from tests.tiny_fit import save_model

_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.foreign_method import DeviationPruning
from tests.both_ways import SMALL, streamed

class Dies(DeviationPruning):
    layerwise, seen = True, 0

    def _score(self, weight, statistics):
        self.seen += 1
        if self.seen == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._score(weight, statistics)

streamed(sys.argv[1], Dies(**SMALL), Path(sys.argv[2]))
"""


def test_killed_half_way(tmp_path: Path) -> None:
    source, out = save_model(tmp_path / "model"), tmp_path / "x" / "out"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, source, str(out)],
        env={**os.environ, "PYTHONPATH": root},
        cwd=root,
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert any(path.name.startswith("out.tmp-") for path in out.parent.iterdir())
    streamed(source, DeviationPruning(**SMALL), out)
    assert not any(path.name.startswith("out.tmp-") for path in out.parent.iterdir())
    load_pruned(out)


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    source = Path(save_model(tmp_path / "model"))
    held = weights(source)
    held["model.layers.1.mlp.up_proj.weight"][0] = torch.inf
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="finite"):
        streamed(str(source), METHODS["fasp"].make(), tmp_path / "x" / "out")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["text"]


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"],
)
def test_weights_that_no_score_sees_are_numbers(tmp_path: Path, method: str, name: str) -> None:
    source = Path(save_model(tmp_path / "model"))
    held = weights(source)
    held[name].view(-1)[3] = torch.nan
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"expected finite weights, got NaN or infinity in {name}"):
        streamed(str(source), METHODS[method].make(), tmp_path / "x" / "out")
    assert not (tmp_path / "x" / "out").exists()


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_need_more_than_a_layer(tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=REFUSED[method]) as caught:
        streamed("nowhere", METHODS[method].make(), tmp_path / "out")
    assert "expected a method that needs one layer at a time" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_smoothing_and_hidden_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch by batch"):
        streamed("nowhere", METHODS["wanda"].make(smoothing=True), tmp_path / "out")
    hidden = DeviationPruning()
    hidden.axes = ("hidden",)
    with pytest.raises(UserError, match="hidden runs through all layers"):
        streamed("nowhere", hidden, tmp_path / "out")


def _broken(source: Path, what: str) -> str:
    """Spoil a checkpoint; what the message must say."""
    file, held = source / "model.safetensors", weights(source)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "whole safetensors files"
    if what == "missing":
        del held[name]
    elif what == "shape":
        held[name] = held[name][:-1].clone()
    elif what == "quantized":
        held[name] = held[name].to(torch.int8)
    elif what == "tied":
        held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    elif what == "pickled":
        torch.save(held, source / "pytorch_model.bin")
    file.unlink()
    if what != "pickled":
        save_file(held, file, {"format": "pt"})
    return {
        "missing": rf"none for {name}",
        "shape": rf"{name} to be \(20, 36\) by config.json",
        "quantized": rf"floating-point weights, got {name} of type I8",
        "tied": "which the config ties",
        "pickled": "pickled files are not loaded",
    }[what]


@pytest.mark.parametrize("what", ["truncated", "missing", "shape", "quantized", "tied", "pickled"])
def test_broken_checkpoints(tmp_path: Path, what: str) -> None:
    source = Path(save_model(tmp_path / "model", "llama-tied"))
    with pytest.raises(UserError, match=_broken(source, what)) as caught:
        streamed(str(source), METHODS["fasp"].make(), tmp_path / "x" / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x" / "out").exists()


def test_sources_and_places_that_do_not_do(tmp_path: Path) -> None:
    make = METHODS["fasp"].make
    with pytest.raises(UserError, match="hf download some/model"):
        streamed("some/model", make(), tmp_path / "out")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="GGUF file, whose weights are quantized"):
        streamed(str(gguf), make(), tmp_path / "out")
    source = save_model(tmp_path / "model")
    with pytest.raises(UserError, match="expected a new folder to write"):
        streamed(source, make(), Path(source))
