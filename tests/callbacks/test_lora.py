"""LoRARecovery: when it attaches, and what it starts from."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_prune import Layout, PrunableLM
from lit_prune.callbacks import Distillation, LoRARecovery, RandomState
from lit_prune.errors import UserError
from lit_prune.fitting.refit import accumulating
from lit_prune.recovery.adapter_files import save_adapter
from lit_prune.recovery.lora import adapter_state
from lit_prune.structure import cut
from tests.structure.tiny import tiny_model
from tests.tiny_fit import CutAt, assert_same, make_data, make_trainer, save_model

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


def load(source: str, **options: Any) -> PrunableLM:
    return PrunableLM(source, **{"dtype": "float32", "learning_rate": 1e-2, **options})


# --- when ------------------------------------------------------------------------------------


class CutTwice(Callback):
    """Cuts after the first and the second step, and says so beforehand."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.pruning_ahead = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any
    ) -> None:
        if not pl_module.pruning_ahead or accumulating(trainer):
            return
        first = pl_module.phase == "dense"

        def change() -> Layout:
            sizes = [layer["channel"] - 2 for layer in pl_module.structure.widths.layers]
            layout = Layout.full(pl_module.structure.widths)
            for number, size in enumerate(sizes):
                layout = layout.replace_layer(number, {"channel": torch.arange(size)})
            cut(pl_module.model, pl_module.structure, layout)
            pl_module.pruning_ahead = first
            return layout

        pl_module.recut(trainer, change)


class Phases(Callback):
    """The phase of each optimizer step, and whether adapters are trained."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}
        self.seen.append((pl_module.phase, any("lora_" in name for name in trained)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_adapters_wait_for_the_last_cut(tmp_path: Path, accumulate: int):
    module, phases = load(save_model(tmp_path / "dense")), Phases()
    trainer = make_trainer(
        tmp_path,
        [CutTwice(), LoRARecovery(rank=2), Distillation(hidden=0.1), phases],
        max_steps=4,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert phases.seen == [("dense", False), ("pruned", False), *[("recovery", True)] * 2]
    assert {layer["channel"] for layer in module.structure.widths.layers} == {16}
    assert module.seconds["recover"] > 0
    assert module.first_step == 2


def test_adapters_wait_for_the_end_of_an_accumulation_window(tmp_path: Path):
    class Between(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.pruning_ahead = True

        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            pl_module.pruning_ahead = batch_idx < 3

    module, phases = load(save_model(tmp_path / "dense")), Phases()
    callbacks = [Between(), LoRARecovery(rank=2), phases]
    trainer = make_trainer(tmp_path, callbacks, max_steps=3, accumulate_grad_batches=3)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert phases.seen == [("dense", False), ("dense", False), ("recovery", True)]


# --- from where ------------------------------------------------------------------------------


class Ends(Callback):
    """Keeps the adapter as training starts and ends, and writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = {k: v.clone() for k, v in adapter_state(pl_module.model).items()}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.end = {k: v.clone() for k, v in adapter_state(pl_module.model).items()}
        save_adapter(pl_module.model, self.folder)


def run(folder: Path, source: str, lora: LoRARecovery, resume: str | None = None) -> Any:
    """A fit of two steps on a cut model, with a checkpoint after each."""
    module, ends = load(source), Ends(folder / "adapter")
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [RandomState(), CutAt(0), lora, ends, saver]
    trainer = make_trainer(folder, callbacks, max_steps=2, enable_checkpointing=True)
    trainer.fit(module, make_data(folder.parent), ckpt_path=resume, weights_only=True)
    return module, ends


def test_a_saved_adapter_is_gone_on_with(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    targets = ["q_proj", "up_proj"]
    _, first = run(tmp_path / "first", source, LoRARecovery(rank=3, alpha=5.0, targets=targets))
    options: dict[str, Any] = {"rank": 7, "adapter": str(tmp_path / "first" / "adapter")}
    module, second = run(tmp_path / "second", source, LoRARecovery(**options))
    assert_same(dict(sorted(second.start.items())), dict(sorted(first.end.items())))
    assert all(not torch.equal(second.end[key], value) for key, value in second.start.items())
    found = module.adapter
    assert (found["rank"], found["alpha"], found["adapter"]) == (3, 5.0, None)
    assert json.loads(json.dumps(found)) == found

    # a fit that resumes does not read it again
    shutil.rmtree(tmp_path / "first" / "adapter")
    path = str(tmp_path / "second" / "checkpoints" / "step=1.ckpt")
    _, again = run(tmp_path / "again", source, LoRARecovery(**options), path)
    assert_same(again.end, second.end)


def test_an_adapter_of_another_cut_is_refused(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    callbacks = [LoRARecovery(rank=2), Ends(tmp_path / "adapter")]
    make_trainer(tmp_path, callbacks, max_steps=1).fit(load(source), make_data(tmp_path))
    lora, module = LoRARecovery(adapter=str(tmp_path / "adapter")), load(source)
    words = r"expected an adapter with 24 outputs at model\.layers\.0\.self_attn\.q_proj, got 48"
    with pytest.raises(UserError, match=words) as error:
        make_trainer(tmp_path, [CutAt(0), lora]).fit(module, make_data(tmp_path))
    assert "\n" not in str(error.value)
    other = load(save_model(tmp_path / "other", num_hidden_layers=2))
    with pytest.raises(UserError, match=r"adapter of this model's layers.*layers\.2"):
        make_trainer(tmp_path, [CutAt(9), lora]).fit(other, make_data(tmp_path))
    nothing = LoRARecovery(adapter=str(tmp_path / "nothing"))
    module = load(source)
    with pytest.raises(UserError, match="expected a peft adapter's folder"):
        make_trainer(tmp_path, [CutAt(0), nothing]).fit(module, make_data(tmp_path))
    assert module.phase == "dense"  # refused before the cut


def test_other_adapters_than_the_checkpoints_are_told() -> None:
    same: list[dict[str, Any]]
    others: list[tuple[dict[str, Any], str]]
    same = [{"rank": 2}, {"rank": 2, "dtype": "float32"}, {"rank": 8, "adapter": "saved"}]
    others = [
        ({"rank": 3}, r"rank 2 \(here 3\)"),
        ({"rank": 2, "seed": 1}, r"seed 0 \(here 1\)"),
        ({"rank": 2, "dtype": "bfloat16"}, r"dtype float32 \(here bfloat16\)"),
    ]
    module = PrunableLM.from_model(tiny_model("llama"))  # float32
    module.attach_adapter(**LoRARecovery(rank=2).options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in same:
            LoRARecovery(**options)._tell_of_changes(module)
    for options, words in others:
        with pytest.warns(UserWarning, match=f"stay as they are: {words}$"):
            LoRARecovery(**options)._tell_of_changes(module)
