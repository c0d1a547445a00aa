"""PrunableLM's checkpoints: what they hold, what they fit, and pruning an export again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from lit_prune import Layout, PrunableLM, load_pruned
from lit_prune.callbacks import (
    Distillation,
    ExportCheckpoint,
    FASPPruning,
    GainLossReport,
    LoRARecovery,
)
from lit_prune.errors import UserError
from lit_prune.structure import cut
from lit_prune.structure.biases import add_bias
from tests.tiny_fit import (
    CutAt,
    Watch,
    assert_same,
    logits,
    make_data,
    make_trainer,
    parameters,
    save_model,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)


def fasp(**options: Any) -> FASPPruning:
    return FASPPruning(**{"samples": 8, "length": 16, **options})


def load(source: str, **options: Any) -> PrunableLM:
    return PrunableLM(source, **{"dtype": "float32", "learning_rate": 1e-2, **options})


def run(folder: Path, module: PrunableLM, *callbacks: Any, **options: Any) -> Trainer:
    """Fit with a checkpoint after each step."""
    saver = ModelCheckpoint(
        folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True
    )
    resume = options.pop("ckpt_path", None)
    trainer = make_trainer(folder, [*callbacks, saver], enable_checkpointing=True, **options)
    trainer.fit(module, datamodule=make_data(folder.parent), ckpt_path=resume, weights_only=True)
    return trainer


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / "checkpoints" / f"step={step}.ckpt")


def plain_parts(value: Any) -> set[type]:
    if isinstance(value, dict):
        return set().union(*map(plain_parts, value.values()), *map(plain_parts, value))
    if isinstance(value, (list, tuple)):
        return set().union(*map(plain_parts, value))
    return {type(value)}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_fit_cut_in_the_middle_resumes_from_before_and_after_the_cut(tmp_path: Path, step: int):
    source = save_model(tmp_path / "dense")
    ends = []
    for part in ("whole", "resumed"):
        watch, module = Watch(), load(source)
        path = None if part == "whole" else checkpoint(tmp_path / "whole", step)
        run(tmp_path / part, module, CutAt(2), watch, max_steps=5, ckpt_path=path)
        ends.append((watch.end, watch.kept, module.layout.to_dict(), watch.rates[-2:]))
    assert_same(*ends)


class CutInto(Callback):
    """Cuts what a layout does not tell: with biases added, other norms, or values alone."""

    def __init__(self, kind: str, step: int) -> None:
        self.kind, self.step = kind, step

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.step == 0:
            self._cut(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            self._cut(trainer, pl_module)

    def _cut(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.phase != "dense":
            return
        model, structure = pl_module.model, pl_module.structure
        layout = Layout.full(structure.widths)

        def change() -> Layout:
            if self.kind == "norms":
                new = Layout(layout.of, torch.arange(0, 36, 2), layout.layers[1:])
                cut(model, structure, new, norm_rescale="none")
                return new
            keep = {"value": torch.tensor([[0, 2, 3, 6], [1, 2, 4, 7]])}
            new = layout if self.kind == "biases" else layout.replace_layer(1, keep)
            new = Layout(new.of, None, new.layers[1:])
            cut(model, structure, new)
            if self.kind == "biases":
                bias = model.model.layers[1].mlp.down_proj
                add_bias(bias)
                bias.bias.data.fill_(0.5)
            return new

        pl_module.recut(trainer, change)


@pytest.mark.parametrize("recovery", [False, True])
@pytest.mark.parametrize("kind", ["biases", "norms", "values"])
def test_a_fit_resumes_what_a_layout_does_not_tell(tmp_path: Path, kind: str, recovery: bool):
    source, ends = save_model(tmp_path / "dense", "qwen3", rms_norm_eps=1e-3), []
    for part in ("whole", "resumed"):
        watch, module = Watch(), load(source)
        path = None if part == "whole" else checkpoint(tmp_path / "whole", 3)
        callbacks: list[Any] = [CutInto(kind, 0), LoRARecovery(rank=2)]
        callbacks = [*(callbacks if recovery else [CutInto(kind, 2)]), ExportCheckpoint(), watch]
        run(tmp_path / part, module, *callbacks, max_steps=5, ckpt_path=path)
        assert module.is_stock == (kind == "norms")
        found = logits(load_pruned(tmp_path / part / "pruned"))
        assert_same(found, watch.logits)
        ends.append((watch.end, watch.kept, module.layout.to_dict(), found))
    assert_same(*ends)


class CutTwice(Callback):
    """Cuts evenly after the first step, so that a stock config fits, and unevenly after the second.

    The exported config must not depend on whether a resume made one cut of the two.
    """

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any, **__: Any) -> None:
        layout = Layout.full(pl_module.structure.widths)
        if trainer.global_step == 1:
            for number in range(len(layout.layers)):
                layout = layout.replace_layer(number, {"channel": torch.arange(16)})
        elif trainer.global_step == 2:
            layout = layout.replace_layer(1, {"channel": torch.arange(0, 16, 2)})
        else:
            return

        def change() -> Layout:
            cut(pl_module.model, pl_module.structure, layout)
            return layout

        pl_module.recut(trainer, change)


def test_the_config_is_that_of_one_run(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    for part, step in (("whole", None), ("from1", 1), ("from2", 2), ("from3", 3)):
        path = None if step is None else checkpoint(tmp_path / "whole", step)
        module = load(source)
        run(tmp_path / part, module, CutTwice(), ExportCheckpoint(), max_steps=4, ckpt_path=path)
        assert not module.is_stock
        for name in ("config.json", "model.safetensors"):
            expected = (tmp_path / "whole" / "pruned" / name).read_bytes()
            assert (tmp_path / part / "pruned" / name).read_bytes() == expected, (part, name)
    assert (
        json.loads((tmp_path / "whole/pruned/config.json").read_text())["intermediate_size"] == 20
    )


def test_a_checkpoint_holds_plain_types_only(tmp_path: Path):
    module = load(save_model(tmp_path / "dense"))
    callbacks = [fasp(), LoRARecovery(rank=2), Distillation(), GainLossReport()]
    run(tmp_path / "run", module, *callbacks, max_steps=2)
    content = torch.load(checkpoint(tmp_path / "run", 1), weights_only=True)
    assert plain_parts(content) <= {str, int, float, bool, type(None), Tensor}
    ours = content["lit_prune"]
    assert json.loads(json.dumps(ours)) == ours
    assert ours["phase"] == "recovery"
    assert ours["seconds"].keys() == {"calibrate_and_prune", "recover"}
    assert not any("teacher" in key for key in content["state_dict"])


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, phase: str):
    source = save_model(tmp_path / "dense")
    run(tmp_path / "run", load(source), CutAt(0 if phase == "after" else 9), max_steps=1)
    for number, (name, changes, words) in enumerate(
        [
            ("gemma3", {}, r"a gemma3_text model, got one of a llama model.*; give"),
            (
                "llama",
                {"intermediate_size": 24},
                r"a llama model with channel 20 \(here 24\) in layer 0, channel .* layer 2; give",
            ),
            ("llama", {"num_hidden_layers": 2}, r"a llama model with 3 layers \(here 2\); give"),
        ]
    ):
        other = load(save_model(tmp_path / f"other{number}", name, **changes))
        with pytest.raises(UserError, match=rf"expected a checkpoint of .*{words}"):
            run(tmp_path / f"run{number}", other, ckpt_path=checkpoint(tmp_path / "run", 1))


def test_adapters_may_come_with_a_resumed_fit(tmp_path: Path):
    """A fit that ends with its cut after two steps, and goes on with adapters, is one in one go."""
    source, found = save_model(tmp_path / "dense"), []

    def fit(name: str, steps: int, *more: Any, ckpt_path: str | None = None) -> None:
        module, watch = load(source, schedule="constant"), Watch()
        callbacks = [fasp(start=2), *more, watch]
        run(tmp_path / name, module, *callbacks, max_steps=steps, ckpt_path=ckpt_path)
        found.append((parameters(module.model), module.first_step, watch.rates[-3:]))

    fit("whole", 5, LoRARecovery(rank=2))
    fit("cut", 2)
    path = checkpoint(tmp_path / "cut", 2)
    fit("cut", 5, LoRARecovery(rank=2), ckpt_path=path)
    assert_same(found[0], found[2])


def test_a_checkpoint_of_adapters_on_a_dense_model_is_not_pruned(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    run(tmp_path / "run", load(source), LoRARecovery(rank=2), max_steps=1)
    path, callbacks = checkpoint(tmp_path / "run", 1), [fasp(), LoRARecovery(rank=2)]
    with pytest.raises(UserError, match="expected a dense model to prune, got one in phase 'reco"):
        run(tmp_path / "again", load(source), *callbacks, max_steps=2, ckpt_path=path)


def test_a_checkpoint_of_another_kind_of_module_is_refused(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    run(tmp_path / "run", load(source), max_steps=1)
    content = torch.load(checkpoint(tmp_path / "run", 1), weights_only=True)
    del content["lit_prune"]
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match="got one of another module"):
        run(tmp_path / "again", load(source), ckpt_path=str(tmp_path / "foreign.ckpt"))


def test_checkpoints_load_into_a_fresh_and_into_the_fitted_module(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    module = load(source)
    trainer = run(
        tmp_path / "run", module, fasp(), LoRARecovery(rank=2), ExportCheckpoint(), max_steps=3
    )
    merged = logits(module.model)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    middle, data = checkpoint(tmp_path / "run", 2), make_data(tmp_path)

    values = []
    for other in (load(source), module):
        for path in (middle, str(tmp_path / "done.ckpt")):
            judge = make_trainer(tmp_path, limit_val_batches=None)
            values += judge.validate(other, datamodule=data, ckpt_path=path, verbose=False)
        assert_same(logits(other.model), merged)
        assert other.phase == "done"
    assert values[:2] == values[2:]
    assert values[0] != values[1]
    again = PrunableLM.load_from_checkpoint(middle, pretrained=source, dtype="float32")
    assert again.phase == "recovery"
    assert again.layout.to_dict() == module.layout.to_dict()


def test_a_checkpoint_brings_the_dtype_that_the_trainer_chose(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    module, watch = load(source), Watch()
    callbacks = [fasp(), LoRARecovery(rank=2), ExportCheckpoint(), watch]
    run(tmp_path / "run", module, *callbacks, max_steps=2, precision="bf16-true")
    path = checkpoint(tmp_path / "run", 2)
    again = PrunableLM.load_from_checkpoint(path, pretrained=source, dtype="float32")
    again.finish()
    assert again.model.dtype == torch.bfloat16
    assert_same(logits(again.model), watch.logits)


# --- the teacher -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("callback", [LoRARecovery, None])
def test_the_teacher_is_the_dense_model_also_after_a_resume(
    tmp_path: Path, precision: Any, callback: Any
):
    source = save_model(tmp_path / "dense")
    dense = load(source)
    dense.configure_model()
    if precision == "bf16-true":
        dense.to(torch.bfloat16)
    for part in ("whole", "resumed"):
        module = load(source)
        path = None if part == "whole" else checkpoint(tmp_path / "whole", 1)
        callbacks = [Distillation()] if callback is None else [fasp(), callback(), Distillation()]
        run(tmp_path / part, module, *callbacks, max_steps=2, ckpt_path=path, precision=precision)
        teacher: Any = module.teacher
        assert not teacher.training
        assert_same(logits(teacher), logits(dense.model))
        assert_same(dict(teacher.named_buffers()), dict(dense.model.named_buffers()))
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert all(part is not teacher for part in module.modules())
        inside = {id(parameter) for parameter in module.parameters()}
        assert not inside & {id(parameter) for parameter in teacher.parameters()}
        assert not any("teacher" in key for key in module.state_dict())


def test_the_teacher_of_a_model_in_memory_must_be_kept(tmp_path: Path):
    model = load_pruned(save_model(tmp_path / "dense"))
    module = PrunableLM.from_model(model)
    assert module.pretrained == str(tmp_path / "dense")
    trainer = make_trainer(tmp_path, [CutAt(0)], max_steps=1)
    trainer.fit(module, make_data(tmp_path, tokenizer=str(tmp_path / "dense")))
    with pytest.raises(UserError, match="keep_teacher = True"):
        module.require_teacher()


# --- pruning an export again -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stock"),
    [("llama", True), ("llama", False), ("phi3", True), ("phi3", False), ("bloom", False)],
)
def test_an_export_is_pruned_again(tmp_path: Path, name: str, stock: bool):
    source = save_model(tmp_path / "dense", name)
    options = {"sparsity": 0.1, "protected_layers": [] if stock else [1]}
    counts, watch, module = [], Watch(), load(source)
    for number in (1, 2):
        module, watch = load(source, stock=stock), Watch()
        report = GainLossReport(rounds=0)
        callbacks = [fasp(**options), LoRARecovery(rank=2), Distillation()]
        callbacks += [report, ExportCheckpoint(), watch]
        run(tmp_path / f"run{number}", module, *callbacks, max_steps=2)
        source = str(tmp_path / f"run{number}" / "pruned")
        counts += [report.models[part]["decoder_parameters"] for part in ("dense", "pruned")]
        assert module.is_stock == stock
        assert_same(logits(load_pruned(source)), watch.logits)
        assert_same(logits(module.require_teacher()), logits(load_pruned(module.pretrained)))
    assert counts[1] == counts[2] > counts[3]
    done = json.loads((tmp_path / "run2" / "report.json").read_text())["sparsity"]
    assert done["decoder"] == pytest.approx(1 - counts[3] / counts[2])
    assert abs(done["decoder"] - 0.1) < 0.02

    record = json.loads((tmp_path / "run2" / "pruned" / "lit_prune.json").read_text())
    assert [entry["base"] for entry in record["lineage"]] == [
        str(tmp_path / "dense"),
        str(tmp_path / "run1" / "pruned"),
    ]
    card = (tmp_path / "run2" / "pruned" / "README.md").read_text()
    assert "## Earlier prunings of this model\n\n1. base dense, method FASP" in card
    assert str(tmp_path) not in card
    loaded = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=not stock)
    assert_same(logits(loaded), watch.logits)


def test_pruning_an_uneven_export_resumes(tmp_path: Path):
    source = save_model(tmp_path / "dense")
    module = load(source)
    run(tmp_path / "first", module, CutAt(0, drop_layer=True), ExportCheckpoint(), max_steps=1)
    ends = []
    for part in ("whole", "resumed"):
        module, watch = load(str(tmp_path / "first" / "pruned")), Watch()
        path = None if part == "whole" else checkpoint(tmp_path / "whole", 1)
        callbacks = [fasp(), LoRARecovery(rank=2), ExportCheckpoint(), watch]
        run(tmp_path / part, module, *callbacks, max_steps=2, ckpt_path=path)
        ends.append((watch.logits, parameters(module.model), module.layout.to_dict()))
    assert_same(*ends)
