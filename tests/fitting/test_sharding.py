"""FSDP2: a model divided over two processes ends as one that each process has under ddp."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_prune.cli.main import run
from lit_prune.errors import UserError
from lit_prune.fitting.refit import STRATEGIES, check_strategy
from lit_prune.fitting.sharding import ShardedStrategy, _check
from tests import sharded_fit
from tests.sharded_fit import FITS, RESUMED
from tests.structure.tiny import tiny_model
from tests.tiny_fit import assert_same, save_model, write_text

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def _start(folder: Path, rank: int, port: int) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sharded_fit", str(folder)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have run everything, once."""
    folder = tmp_path_factory.mktemp("sharded")
    save_model(folder / "dense")
    save_model(folder / "tied", tie_word_embeddings=True)
    write_text(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [_start(folder, rank, port) for rank in (0, 1)]
    told = [process.communicate(timeout=600)[0] for process in started]
    for process, text in zip(started, told, strict=True):
        assert process.returncode == 0, text[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each process ended with."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_close(one: Any, other: Any, name: str) -> None:
    """Equal to the bit, or nearly where gradients are accumulated or clipped."""
    if name.startswith("own"):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    else:
        assert_same(one, other)


@pytest.mark.parametrize("name", FITS)
def test_it_ends_as_under_ddp(ranks: Any, name: str) -> None:
    for found in ranks:
        ddp, sharded = found[f"{name} ddp"], found[f"{name} fsdp2"]
        assert sharded["layout"] == ddp["layout"]
        assert_close(sharded["end"], ddp["end"], name)
    assert_same(ranks[0][f"{name} fsdp2"]["end"], ranks[1][f"{name} fsdp2"]["end"])


@pytest.mark.parametrize("name", FITS)
def test_each_process_trains_a_share(ranks: Any, name: str) -> None:
    shares = [found[f"{name} fsdp2"]["shares"] for found in ranks]
    assert len(shares[0]) == FITS[name](Path())[3]["max_steps"]
    for first, second in zip(*shares, strict=True):
        assert 0.45 < first < 0.55
        assert first + second == pytest.approx(1)
    assert set(ranks[0][f"{name} ddp"]["shares"]) == {1.0}


def test_each_window_is_measured_once(folder: Path, ranks: Any) -> None:
    for strategy in ("ddp", "fsdp2"):
        report = json.loads((folder / f"iterative-{strategy}" / "report.json").read_text())
        for found in ranks:
            logged = found[f"iterative {strategy}"]["measured"]
            assert logged == pytest.approx(report["models"]["recovered"]["perplexity"], rel=1e-5)


@pytest.mark.parametrize("name", FITS)
def test_nothing_of_fsdp_stays_on_the_model(ranks: Any, name: str) -> None:
    assert ranks[0][f"{name} fsdp2"]["left"] == ranks[0][f"{name} ddp"]["left"]


@pytest.mark.parametrize("name", FITS)
def test_checkpoints_are_those_of_ddp(folder: Path, name: str) -> None:
    paths = sorted((folder / f"{name}-ddp").glob("step=*.ckpt"))
    assert len(paths) == FITS[name](Path())[3]["max_steps"]
    for path in paths:
        other = folder / f"{name}-fsdp2" / path.name
        ddp, sharded = (torch.load(file, weights_only=True) for file in (path, other))
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            assert_close(
                dict(enumerate(_plain(sharded[key]))), dict(enumerate(_plain(ddp[key]))), name
            )
        # tied weights once, whole ones only; times are written with more or fewer digits
        assert other.stat().st_size < path.stat().st_size + 1000


def _plain(value: Any) -> list[Any]:
    """Tensors and numbers in a nest of dicts and lists."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _plain(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _plain(item)]
    return [value]


@pytest.mark.parametrize(("name", "made_by"), [row[:2] for row in RESUMED])
def test_resumed_is_uninterrupted(ranks: Any, name: str, made_by: str) -> None:
    for found in ranks:
        straight, resumed = found[f"{name} fsdp2"], found[f"{name} resumed"]
        assert resumed["layout"] == straight["layout"]
        assert_same(resumed["end"], straight["end"])


def test_one_device_goes_on_from_its_checkpoint(
    folder: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(*args: Any, **options: Any) -> Any:
        return make(*args, **{**options, "devices": 1})

    make = sharded_fit.make_trainer
    monkeypatch.setattr(sharded_fit, "make_trainer", alone)
    path = str(folder / "one-shot-fsdp2" / "step=2.ckpt")
    found = sharded_fit.fit(folder, "one-shot", "auto", "alone", path)
    assert found["layout"] == ranks[0]["one-shot fsdp2"]["layout"]
    assert found["shares"] == [1.0]


@pytest.mark.parametrize("name", FITS)
def test_exports_and_reports_are_those_of_ddp(folder: Path, name: str) -> None:
    runs = [folder / f"{name}-{strategy}" for strategy in ("fsdp2", "ddp")]
    sharded, ddp = (load_file(run / "pruned" / "model.safetensors") for run in runs)
    assert_close(sharded, ddp, name)
    model = AutoModelForCausalLM.from_pretrained(runs[0] / "pruned", trust_remote_code=True)
    for key, value in sharded.items():
        assert torch.equal(model.state_dict()[key], value)
    measured = [json.loads((run / "report.json").read_text())["models"] for run in runs]
    assert measured[0].keys() == {"dense", "pruned", "recovered"}
    for key, entry in measured[0].items():
        other = measured[1][key]
        assert entry["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
        assert entry["parameters"] == other["parameters"]


@pytest.mark.parametrize(
    "kind",
    [
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
        SingleDeviceXLAStrategy,
        XLAStrategy,
    ],
)
def test_other_strategies_are_refused(kind: type) -> None:
    with pytest.raises(UserError, match=f"ddp or fsdp2.* got {kind.__name__};") as caught:
        check_strategy(kind)
    assert "\n" not in str(caught.value)


def test_the_command_line_refuses_them_before_what_they_need(tmp_path: Path) -> None:
    options = {"model.pretrained": "none", "data.train": "none", "trainer.accelerator": "cpu"}
    options |= {"trainer.strategy": "deepspeed", "trainer.default_root_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="got DeepSpeedStrategy;"):
        run(["fit", *(f"--{name}={value}" for name, value in options.items())])


@pytest.mark.parametrize("kind", STRATEGIES)
def test_these_are_not(kind: type) -> None:
    check_strategy(kind)


def test_layers_that_share_weights_are_refused() -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True)
    _check(model, "model.layers")  # outside of the layers it may be
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"got model.layers.1.mlp.up_proj.weight$"):
        _check(model, "model.layers")


def test_trained_weights_of_several_dtypes_are_refused() -> None:
    model: Any = tiny_model("llama")
    norm = model.model.layers[1].input_layernorm
    norm.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"one dtype under fsdp2, got model.layers.1"):
        _check(model, "model.layers")
    norm.requires_grad_(False)
    _check(model, "model.layers")


def test_an_optimizer_in_8_bit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eight: Any = type("AdamW8bit", (), {"__module__": "bitsandbytes.optim"})()
    strategy = ShardedStrategy()
    monkeypatch.setattr(
        ModelParallelStrategy,
        "setup_optimizers",
        lambda self, trainer: strategy._optimizers.append(eight),
    )
    with pytest.raises(UserError, match="got bitsandbytes' AdamW8bit; use adamw"):
        strategy.setup_optimizers(None)
