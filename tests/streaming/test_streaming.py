"""Streamed from files to files: the same to the bit as in memory, one layer at a time."""

from __future__ import annotations

import gc
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_prune import callbacks, load_pruned
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.streaming.shards import ShardReader
from lit_prune.streaming.shelf import Shelf
from tests.both_ways import (
    REFUSED,
    SMALL,
    assert_equal,
    assert_same_as_in_memory,
    in_memory,
    streamed,
    weights,
)
from tests.foreign_method import DeviationPruning
from tests.method_table import METHODS
from tests.tiny_fit import logits, save_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in REFUSED])
def test_every_method(tmp_path: Path, method: str, family: str, dtype: str) -> None:
    source = save_model(tmp_path / "model", family, dtype=getattr(torch, dtype))
    assert_same_as_in_memory(tmp_path, source, METHODS[method].make, dtype=dtype)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("FASPPruning", "llama-tied"),
        ("FASPPruning", "gpt_neox"),  # whose files name the head in their own way
        ("FASPPruning", "bloom"),
        ("FASPPruning", "gemma3"),
        ("WandaPruning", "opt"),
        ("FLAPPruning", "opt"),
        ("FLAPPruning", "qwen3"),
    ],
)
def test_kinds_of_models(tmp_path: Path, method: str, family: str) -> None:
    source = save_model(tmp_path / "model", family)
    options = {**SMALL, "sparsity": 0.15, "axes": ["group", "channel"]}

    def make() -> Any:
        return getattr(callbacks, method)(**options)

    out = assert_same_as_in_memory(tmp_path, source, make, dtype="float32")
    ours = load_pruned(out)
    assert torch.equal(logits(ours), logits(load_pruned(tmp_path / "b" / "out")))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (DeviationPruning, {"restoration": "bias", "multiple": 4}),
        (DeviationPruning, {"restoration": "none", "relative_to": "total", "multiple": 4}),
        (DeviationPruning, {"restoration": "unit_scales", "per_layer_ratio": 0.3}),
        (callbacks.MagnitudePruning, {"restoration": "bias", "protected_layers": [1]}),
        (callbacks.MagnitudePruning, {"restoration": "least_squares", "allocation": "global"}),
        (callbacks.FASPPruning, {"delta": 0.1, "ridge": "zero", "protected_layers": [0]}),
    ],
)
def test_options(tmp_path: Path, method: Any, options: dict[str, Any]) -> None:
    source = save_model(tmp_path / "model")
    assert_same_as_in_memory(tmp_path, source, lambda: method(**SMALL, **options), dtype="auto")


def test_stock_and_another_dtype_than_the_files(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "llama-tied")
    chosen = {"max_new_tokens": 7, "temperature": 0.5}  # without sampling, as published ones may be
    (Path(source) / "generation_config.json").write_text(json.dumps(chosen))
    make = METHODS["fasp"].make
    out = assert_same_as_in_memory(tmp_path, source, make, stock=True, dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.max_new_tokens == 7
    assert not (out / "modeling_lit_pruned.py").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = weights(out)
    assert set(index["weight_map"]) == set(held)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())


@pytest.mark.parametrize("first", [{"stock": True}, {}])
def test_an_earlier_export(tmp_path: Path, first: dict[str, Any]) -> None:
    make = METHODS["magnitude"].make
    source = save_model(tmp_path / "model", "llama")
    once = in_memory(source, make(), tmp_path / "once" / "out", dtype="float32", **first)
    assert_same_as_in_memory(tmp_path, str(once), METHODS["flap"].make, dtype="float32")


def test_other_spellings_of_a_checkpoint(tmp_path: Path) -> None:
    """Several files, names without the base model's prefix, a tied head written out."""
    source = Path(save_model(tmp_path / "model", "llama-tied"))
    plain = streamed(str(source), METHODS["fasp"].make(), tmp_path / "plain" / "out")
    held = weights(source)
    (source / "model.safetensors").unlink()
    named = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    named["lm_head.weight"] = named["embed_tokens.weight"].clone()
    named["leftover"] = torch.zeros(1, dtype=torch.int8)
    where = {name: f"part{number % 3}.safetensors" for number, name in enumerate(named)}
    for file in set(where.values()):
        save_file({n: t for n, t in named.items() if where[n] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_equal(streamed(str(source), METHODS["fasp"].make(), tmp_path / "x" / "out"), plain)


# --- one layer at a time -----------------------------------------------------------------------


@pytest.mark.parametrize(("method", "passes"), [("fasp", 1), ("magnitude", 2), ("flap", 2)])
def test_a_layer_is_read_once_in_a_pass_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, passes: int
) -> None:
    read: Counter[str] = Counter()
    before, put_back, alive = ShardReader.read, Shelf.put_back, []

    def counted(self: Any, names: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        names = list(names)
        read.update(names)
        return before(self, names, dtype)

    def watched(self: Any) -> None:
        real = [layer for layer in self._layers if not next(layer.parameters()).is_meta]
        alive.append(len(real))
        put_back(self)
        assert all(p.is_meta for layer in self._layers for p in layer.parameters())

    monkeypatch.setattr(ShardReader, "read", counted)
    monkeypatch.setattr(Shelf, "put_back", watched)
    source = save_model(tmp_path / "model")
    streamed(source, METHODS[method].make(), tmp_path / "x" / "out")
    layers = {name: number for name, number in read.items() if ".layers." in name}
    # the first layer is there when tokens enter, before a second pass begins
    assert set(layers.values()) == {passes}, layers
    assert max(alive) == 1


class Weighing(DeviationPruning):
    """Weighs the tensors that are in memory while the last layer is pruned."""

    layerwise, calls, held = True, 0, 0

    def _score(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        self.calls += 1
        self.held = _held() if self.calls == self.power else 0
        return weight.float().norm(dim=0)


def _held() -> int:
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return sum(t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu")


def test_tensors_in_memory_do_not_grow_with_depth(tmp_path: Path) -> None:
    rises = []
    for depth in (2, 6):
        source = save_model(tmp_path / str(depth), num_hidden_layers=depth)
        weighing, before = Weighing(power=depth, **SMALL), _held()
        streamed(source, weighing, tmp_path / f"{depth}x" / "out")
        rises.append(weighing.held - before)
    assert rises[0] > 0
    assert rises[1] <= 1.1 * rises[0]


@pytest.mark.slow
def test_resident_memory_stays_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    rows = importlib.import_module("bench_streaming").table("FASPPruning", (8, 32))
    assert rows[1]["streaming"] <= 1.1 * rows[0]["streaming"]
    assert rows[1]["memory"] >= 2 * rows[0]["memory"]
