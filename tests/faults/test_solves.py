"""Solves that fail, and cuts that are broken off: said aloud, and never exported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune import PrunableLM, Structure
from lit_prune.allocation.plan import Plan
from lit_prune.calibration.stream import Stream
from lit_prune.callbacks import ExportCheckpoint, FASPPruning, GainLossReport, MagnitudePruning
from lit_prune.cli.saving import LastCheckpoint
from lit_prune.cutting import layerwise
from lit_prune.cutting.layerwise import by_columns, prune_layers
from lit_prune.cutting.wholeness import changing, require_whole
from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint
from lit_prune.export.describe import card_of
from lit_prune.restoration.unit_scales import unit_scales
from lit_prune.scores import column_scores
from lit_prune.structure import cut
from tests.faults.test_fits import fit
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_data, make_tokenizer, make_trainer, save_model, token_ids, uneven


def indefinite(monkeypatch: pytest.MonkeyPatch, size: float, layer: int = 1) -> None:
    """Take so much of its mean diagonal from the Gram matrix of a layer's down projection."""
    solve = layerwise.least_squares

    def worse(weight: Tensor, gram: Tensor, keep: Tensor, *, place: str, **options: Any) -> Tensor:
        if place == f"model.layers.{layer}.mlp.down_proj":
            gram = gram - size * gram.diagonal().mean() * torch.eye(len(gram))
        return solve(weight, gram, keep, place=place, **options)

    monkeypatch.setattr(layerwise, "least_squares", worse)


def test_a_ridge_that_had_to_be_raised_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "dense")
    indefinite(monkeypatch, 0.5)
    callbacks = [FASPPruning(samples=4, length=16), GainLossReport(rounds=0), ExportCheckpoint()]
    text = (
        r"statistics at the input of model.layers.1.mlp.down_proj are not positive definite with "
        r"delta 0.001; least squares took 0.1 there"
    )
    with pytest.warns(UserWarning, match=text):
        module = fit(tmp_path, *callbacks)
    (found,) = module.history[0]["warnings"]
    assert found.endswith("least squares took 0.1 there")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["warnings"] == [found]


def test_a_model_left_half_cut_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "dense")
    indefinite(monkeypatch, 1e6)
    module = PrunableLM(str(tmp_path / "dense"), dtype="float32")
    callbacks = [FASPPruning(samples=4, length=16), GainLossReport(rounds=0), ExportCheckpoint()]
    saver = LastCheckpoint(tmp_path / "run", save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer = make_trainer(
        tmp_path / "run", [*callbacks, saver], max_steps=2, enable_checkpointing=True
    )
    with pytest.raises(UserError, match=r"not at the input of model\.layers\.1\.mlp\.down") as e:
        trainer.fit(module, datamodule=make_data(tmp_path / "data"))
    assert "\n" not in str(e.value)
    assert not any(file.is_file() for file in (tmp_path / "run").rglob("*"))
    assert module.structure.widths != module.layout.of  # layer 0 is cut
    for action in (
        lambda: module.export(tmp_path / "out", card_of(module, "x")),
        lambda: trainer.save_checkpoint(tmp_path / "x.ckpt"),
        lambda: make_trainer(tmp_path, [MagnitudePruning()], max_steps=0).fit(
            module, datamodule=make_data(tmp_path / "data")
        ),
    ):
        with pytest.raises(UserError, match="left half cut; load it again"):
            action()
    assert sorted(os.listdir(tmp_path)) == ["data", "dense"]


def test_an_error_before_the_first_cut_leaves_a_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indefinite(monkeypatch, 1e6, layer=0)
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match="positive definite"):
        fit(tmp_path, FASPPruning(samples=4, length=16), model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    require_whole(model)


def test_weights_too_large_for_their_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        layerwise, "least_squares", lambda w, g, keep, **_: w.float()[:, keep] * 1e9
    )
    with pytest.raises(UserError, match=r"finite restored weights.*in model\.layers\.0\.mlp"):
        fit(tmp_path, FASPPruning(samples=4, length=16), model=tiny_model("llama").half())


def test_layers_without_a_module_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    indefinite(monkeypatch, 1e6)
    model: Any = tiny_model("llama")
    structure, ids = Structure.of(model), token_ids(8)
    stream = Stream(model, structure, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    plan = Plan({"channel": [3, 3, 3]}, 0.0)
    choice = by_columns(structure, lambda w, x: column_scores(w, x.norms()), plan)
    with pytest.raises(UserError, match="positive definite"):
        prune_layers(model, structure, stream, choice, ["channel"])
    options: dict[str, Any] = {"config": None, "layout": {}, "lineage": [], "card": ""}
    with pytest.raises(UserError, match="left half cut"):
        export_checkpoint(model, None, tmp_path / "o", **options)


def test_a_cut_of_ones_own_that_is_broken_off(tmp_path: Path) -> None:
    class Breaks(MagnitudePruning):
        def apply(self, calibration: Any, layout: Any) -> None:
            super().apply(calibration, layout)
            raise UserError("no")

    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    trainer = make_trainer(tmp_path, [Breaks()], max_steps=0)
    with pytest.raises(UserError, match="no"):
        trainer.fit(module, datamodule=make_data(tmp_path / "data"))
    with pytest.raises(UserError, match="left half cut"):
        module.export(tmp_path / "o", "")


def test_scales_that_nothing_determines(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(*_: Any) -> Tensor:
        torch.linalg.inv(torch.zeros(2, 2))
        raise AssertionError

    monkeypatch.setattr(torch.linalg, "solve", singular)
    with pytest.raises(UserError, match="expected unit scales that"):
        unit_scales(torch.ones(2, 3), torch.eye(3), torch.ones(3, 2), torch.arange(3))


def test_what_counts_as_changed() -> None:
    model = tiny_model("llama")

    def broken(change: Any) -> bool:
        own = tiny_model("llama")

        def fail() -> None:
            change(own)
            raise KeyError

        with pytest.raises(KeyError), changing(own):
            fail()
        return hasattr(own, "_lit_prune_broken_off")

    structure = PrunableLM.from_model(model).structure
    assert not broken(lambda own: own(torch.ones(1, 3, dtype=torch.long)).logits.sum().backward())
    assert not broken(lambda own: own.requires_grad_(False))
    assert broken(lambda own: nn.init.zeros_(own.lm_head.weight))
    assert broken(lambda own: cut(own, structure, uneven(structure)))
    assert broken(lambda own: own.add_module("more", nn.Linear(2, 2)))
    with changing(model):
        nn.init.zeros_(model.get_parameter("lm_head.weight"))
    require_whole(model)
