"""A disk that is full: no half file under a final name, and what was there stays."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_prune.cli.guard import user_message
from lit_prune.cli.saving import AtomicCheckpointIO, atomic_write
from lit_prune.data.cache import cached
from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint
from lit_prune.recovery.adapter_files import save_adapter
from lit_prune.recovery.lora import attach_lora
from lit_prune.reporting.report import write_report
from tests.both_ways import SMALL, streamed
from tests.foreign_method import DeviationPruning
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_tokenizer, save_model

_LARGE = {"x": torch.arange(20_000)}


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Let files grow to a number of bytes only; the kernel then says what a full disk makes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _report(folder: Path, size: int) -> None:
    write_report({"x": "y" * size, "warnings": []}, folder / "report.json")


def _checkpoint(folder: Path, size: int) -> None:
    AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(size // 4)}, folder / "last.ckpt")


def _text(folder: Path, size: int) -> None:
    with atomic_write(folder / "config.yaml") as file:
        file.write(b"x" * size)


def _adapter(folder: Path, size: int) -> None:
    model: Any = tiny_model("llama")
    rank, targets = 1 if size < 9000 else 99, ["model.layers.0.mlp.up_proj"]
    attach_lora(model, rank=rank, alpha=1.0, targets=targets, dtype=torch.float32, seed=0)
    save_adapter(model, folder / "adapter")


def _tokens(folder: Path, size: int) -> None:
    cached(folder / "tokens" / "x.safetensors", lambda: {"x": torch.zeros(size // 4)})


@pytest.mark.parametrize("write", [_report, _checkpoint, _text, _adapter])
def test_a_file_or_folder_is_whole_or_not_there(
    tmp_path: Path, write: Callable[[Path, int], None]
) -> None:
    with pytest.raises(Exception, match="File too large") as caught, full_after(9000):
        write(tmp_path, 100_000)
    assert contents(tmp_path) == {}
    assert "\n" not in str(user_message(caught.value))
    write(tmp_path, 100)
    before = contents(tmp_path)
    assert before
    if write is not _adapter:  # which does not replace one
        with pytest.raises(OSError, match="File too large"), full_after(9000):
            write(tmp_path, 100_000)
        assert contents(tmp_path) == before


def test_tokens_that_do_not_fit_are_no_error(tmp_path: Path) -> None:
    with full_after(9000):
        assert cached(tmp_path / "x.safetensors", lambda: _LARGE)["x"] is _LARGE["x"]
    assert contents(tmp_path) == {}
    _tokens(tmp_path, 100)
    assert list(contents(tmp_path)) == ["tokens/x.safetensors"]


@pytest.mark.parametrize("limit", [20_000, 3_000, 500])
def test_an_export_is_whole_or_not_there(tmp_path: Path, limit: int) -> None:
    model: Any = tiny_model("llama")
    options: dict[str, Any] = {"layout": {}, "lineage": [], "card": "x" * 600}

    def export() -> None:
        export_checkpoint(
            model, make_tokenizer(), tmp_path / "pruned", config=model.config, **options
        )

    with pytest.raises(UserError, match="enough disk space") as caught, full_after(limit):
        export()
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}
    export()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="enough disk space"), full_after(limit):
        export()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "lit_prune.json", "config.json"])
def test_any_file_of_an_export(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    model.config.use_cache = True
    card, lineage = ("x" * 400_000, []) if name == "README.md" else ("", [])
    if name == "lit_prune.json":
        lineage = ["x" * 400_000]
    tokenizer = make_tokenizer()
    if name == "tokenizer.json":
        tokenizer.add_tokens([f"word{number}" for number in range(4000)])
    if name == "config.json":
        model.config.note = "x" * 400_000
    options: dict[str, Any] = {"layout": {}, "lineage": lineage, "card": card}
    with pytest.raises(UserError, match="enough disk space"), full_after(300_000):
        export_checkpoint(model, tokenizer, tmp_path / "o", config=model.config, **options)
    assert contents(tmp_path) == {}


def test_a_streamed_checkpoint_is_whole_or_not_there(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense", vocab_size=3000)
    parameters = tiny_model("llama").get_submodule("model.layers.0").parameters()
    layer = 4 * sum(parameter.numel() for parameter in parameters)
    data = tmp_path / "x"
    for limit in (layer // 2, 3 * layer):  # in the first layer; in the embedding behind all
        with pytest.raises(UserError, match="enough disk space"), full_after(limit):
            streamed(source, DeviationPruning(**SMALL), data / "out", dtype="float32")
        assert not [name for name in contents(data) if not name.startswith("text/")]
        assert not (data / "out").exists()


def test_an_earlier_checkpoint_stays_loadable(tmp_path: Path) -> None:
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    with pytest.raises(OSError, match="File too large"), full_after(9000):
        plugin.save_checkpoint({"step": 2, "x": torch.zeros(9000)}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_limit_is_one(tmp_path: Path) -> None:
    """The tests above would pass if nothing was ever limited and all errors were others."""
    with full_after(9000):
        (tmp_path / "small").write_text(json.dumps("x" * 8000))
    with pytest.raises(Exception, match="os error 27"), full_after(9000):
        save_file(_LARGE, tmp_path / "x.safetensors")
