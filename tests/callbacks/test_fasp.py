from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch import nn

from lit_prune import PrunableLM
from lit_prune.allocation.plan import uniform
from lit_prune.calibration.stream import Stream
from lit_prune.callbacks import FASPPruning
from lit_prune.cutting.layerwise import Restoration, by_columns, prune_layers
from lit_prune.errors import UserError
from lit_prune.scores import column_scores
from lit_prune.structure import Structure
from lit_prune.structure.counting import count_actual, unique_labels
from tests.fasp_ranks import Windows, callback, trainer_of
from tests.structure.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def fitted(fasp: FASPPruning, name: str = "llama", **options: Any) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model(name), **options)
    trainer_of(fasp).fit(module, datamodule=Windows())
    return module


def assert_same(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("axes", [["channel"], ["group", "channel"], ["query", "channel"]])
@pytest.mark.parametrize("protected", [[], [1]])
def test_a_fit_prunes_as_the_functions_do(axes: list[Any], protected: list[int]) -> None:
    data, sparsity = Windows(), 0.2
    options = {"axes": axes, "sparsity": sparsity, "protected_layers": protected}
    fasp = callback(6, ridge="zero", delta=0.01, **options)
    module = PrunableLM.from_model(tiny_model("llama"))
    trainer_of(fasp).fit(module, datamodule=data)
    assert data.asked[0] == (6, 24, 2)

    model = tiny_model("llama")
    structure = Structure.of(model)
    before = count_actual(model, structure, decoder=True), count_actual(model, structure)
    labels = unique_labels(model, structure)
    plan = uniform(labels, structure.widths, sparsity, axes, protected=protected)
    stream = Stream(model, structure, Windows().calibration_batches(6, 24, 2))
    how = Restoration(ridge="zero", delta=0.01)
    choose = by_columns(structure, lambda w, x: column_scores(w, x.norms()), plan)
    layout = prune_layers(model, structure, stream, choose, axes, restoration=how)
    assert module.layout.to_dict() == layout.to_dict()
    assert_same(module.model, dict(model.named_parameters()))

    assert module.phase == "pruned"
    assert module.structure.widths == layout.widths()
    (step,) = module.history
    after = count_actual(model, structure, decoder=True), count_actual(model, structure)
    assert step["sparsity"] == {
        "target": sparsity,
        "decoder": pytest.approx(1 - after[0] / before[0]),
        "total": pytest.approx(1 - after[1] / before[1]),
    }
    assert step["sparsity"]["decoder"] == pytest.approx(plan.sparsity)
    assert step["options"]["axes"] == axes
    json.dumps(step)


def test_without_restoration_the_weights_are_dense_ones() -> None:
    module = fitted(callback(restoration="none", axes=["channel"], sparsity=0.2))
    dense = tiny_model("llama").state_dict()
    for layer, unit in enumerate(module.layout.layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        found = module.model.get_parameter(name)
        assert torch.equal(found, dense[name][:, unit.keep["channel"]])


def test_a_resumed_fit_is_not_pruned_again(tmp_path: Path) -> None:
    first = PrunableLM.from_model(tiny_model("llama"))
    trainer = trainer_of(callback())
    trainer.fit(first, datamodule=Windows())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    again, data = PrunableLM.from_model(tiny_model("llama")), Windows()
    trainer_of(callback()).fit(again, datamodule=data, ckpt_path=str(tmp_path / "pruned.ckpt"))
    assert again.phase == "pruned"
    assert (6, 24, 2) not in data.asked
    assert again.layout.to_dict() == first.layout.to_dict()
    assert again.history == first.history
    assert_same(again.model, dict(first.model.named_parameters()))


def test_a_pruned_module_is_not_pruned_in_a_second_fit() -> None:
    module = fitted(callback())
    with pytest.raises(UserError, match=r"expected a dense model to prune, got .*'pruned'"):
        trainer_of(callback()).fit(module, datamodule=Windows())


def test_stock_gives_every_layer_the_same_widths() -> None:
    module = fitted(callback(sparsity=0.5, axes=["query", "channel"]), stock=True)
    assert module.is_stock
    widths = module.structure.widths
    assert widths.uniform("channel") == module.model.config.intermediate_size
    assert widths.layers[0]["query"] * 2 == module.model.config.num_attention_heads
    assert widths.layers[0]["channel"] < 20


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.0}, "a sparsity from 0 to below 1, got 1"),
        ({"sparsity": -0.1}, "a sparsity from 0 to below 1, got -0.1"),
        ({"sparsity": float("nan")}, "a sparsity from 0 to below 1, got nan"),
        ({"delta": 0.0}, "a delta above 0, got 0"),
        ({"delta": float("nan")}, "a delta above 0, got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"expected {text}"):
        FASPPruning(**options)


@pytest.mark.parametrize(
    ("name", "options", "module", "text"),
    [
        ("llama", {"sparsity": 0.95}, {}, "can reach, got 0.95; the nearest is"),
        ("gpt2", {"axes": ["query"]}, {}, r"gpt2 can cut \(channel, group, value, hidden, layer\)"),
        ("llama", {"protected_layers": [3]}, {}, "protected layers from 0 to 2, got 3"),
        ("bloom", {"axes": ["channel"]}, {"stock": True}, "--stock that the config of bloom"),
        ("gpt_neox", {}, {"stock": True}, "--stock that the config of gpt_neox"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_cut(
    name: str, options: dict[str, Any], module: dict[str, Any], text: str
) -> None:
    data, wrapped = Windows(), PrunableLM.from_model(tiny_model(name), **module)
    with pytest.raises(UserError, match=text) as caught:
        trainer_of(callback(**options)).fit(wrapped, datamodule=data)
    assert "\n" not in str(caught.value)
    assert (6, 24, 2) not in data.asked
    assert wrapped.phase == "dense"
    assert_same(wrapped.model, dict(tiny_model(name).named_parameters()))


class Plain(LightningDataModule):
    def train_dataloader(self) -> Any:
        return Windows().train_dataloader()


def test_data_without_calibration_windows_is_refused() -> None:
    module = PrunableLM.from_model(tiny_model("llama"))
    with pytest.raises(UserError, match=r"calibration_batches\(.*got Plain; use .*TextDataModule"):
        trainer_of(callback()).fit(module, datamodule=Plain())
    with pytest.raises(UserError, match="got NoneType"):
        trainer_of(callback()).fit(module, train_dataloaders=Windows().train_dataloader())


@pytest.mark.parametrize("samples", [6, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_choose_the_units_of_one(tmp_path: Path, samples: int) -> None:
    """Three batches for two processes, and one, so that a process has none."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tests" / "fasp_ranks.py"), str(tmp_path), str(samples)]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    alone = fitted(callback(samples))
    weights = [load_file(tmp_path / f"{samples}-{rank}.safetensors") for rank in (0, 1)]
    assert weights[0].keys() == weights[1].keys() == dict(alone.model.named_parameters()).keys()
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.allclose(weights[0][name], parameter, atol=1e-3)
    for rank in (0, 1):
        text = (tmp_path / f"{samples}-{rank}.json").read_text(encoding="utf-8")
        shares = {6: (2, 1), 2: (1, 0)}[samples]
        expected = {"layout": alone.layout.to_dict(), "batches": shares[rank]}
        assert json.loads(text) == expected
