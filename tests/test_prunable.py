"""Prunable: where the model may stand, the loss, the optimizers, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_prune import Prunable, PrunableLM
from lit_prune.callbacks import LoRARecovery, WandaPruning
from lit_prune.errors import UserError
from lit_prune.recovery.distillation import cross_entropy
from tests.own_project import OwnData, Tempered
from tests.structure.tiny import tiny_model
from tests.tiny_fit import CutAt, assert_same, logits, make_tokenizer, make_trainer, parameters


class Base(LightningModule):
    """Somebody else's base class."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        self.called: list[str] = []
        self.build()

    def build(self) -> None:
        """Makes the model."""

    def on_fit_start(self) -> None:
        self.called.append("fit")

    def on_before_backward(self, loss: Tensor) -> None:
        self.called.append("backward")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["base"] = self.rate

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.called.append(f"load {checkpoint['base']}")

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


class Mine(Prunable, Base):
    """Offers the model while its base class is being made."""

    def build(self) -> None:
        self.net = Tempered(tiny_model("llama"))
        self.adopt(self.net.lm, make_tokenizer())

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch, self.net(batch))


def wanda(**options: Any) -> WandaPruning:
    return WandaPruning(**{"samples": 4, "length": 16, "batch_size": 2, **options})


def fit(module: Any, folder: Path, *callbacks: Any, steps: int = 2, **options: Any) -> Trainer:
    trainer = make_trainer(folder, callbacks or [wanda()], steps, **options)
    trainer.fit(module, datamodule=OwnData())
    return trainer


# --- where the model stands ------------------------------------------------------------------


def test_a_wrapped_model_is_reached_and_saved_once():
    module = Mine()
    assert module.model is module.net.lm
    assert module.vocab_size == 61
    assert module.pretrained == "LlamaForCausalLM"
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    assert names == list(module.state_dict())
    assert all(name.startswith("net.") for name in names)
    other = copy.deepcopy(module)
    assert other.model is other.net.lm is not module.model
    assert other.structure is not module.structure


@pytest.mark.parametrize("first", [True, False])
def test_a_model_that_is_called_model_is_a_plain_submodule(first: bool):
    module, model = Prunable(), tiny_model("llama")
    if first:
        module.model = model
    module.adopt(model)
    module.adopt(model, "a tokenizer")  # the same again does no harm
    module.model = model
    assert {name.partition(".")[0] for name in module.state_dict()} == {"model"}
    assert module.tokenizer == "a tokenizer"


def test_a_cut_leaves_other_parameters_and_hooks_of_the_base_alone(tmp_path: Path):
    module = Mine(rate=0.5)
    trainer = fit(module, tmp_path, wanda(axes=["group", "channel"]), steps=2)
    assert module.called == ["fit", "backward", "backward"]
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    trained = trainer.optimizers[0].param_groups[0]["params"]
    assert [id(p) for p in trained] == [id(p) for p in module.parameters()]
    assert module.net.temperature.grad is not None
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = Mine.load_from_checkpoint(tmp_path / "end.ckpt")
    assert again.called == ["load 0.5"]
    assert_same(parameters(again), parameters(module))
    assert_same(logits(again.model), logits(module.model))


def test_a_model_of_another_precision_keeps_its_computed_buffers(tmp_path: Path):
    module = Mine()
    before = dict(module.model.named_buffers())
    fit(module, tmp_path, CutAt(1), LoRARecovery(rank=2), precision="bf16-true")
    assert module.net.temperature.dtype == torch.bfloat16
    assert {name: b.dtype for name, b in module.model.named_buffers()} == {
        name: buffer.dtype for name, buffer in before.items()
    }


def test_the_dense_model_is_there_after_a_cut_if_it_was_kept(tmp_path: Path):
    kept, lost = Mine(), Mine()
    kept.keep_teacher = True
    for module in (kept, lost):
        fit(module, tmp_path, steps=1)
    assert_same(logits(kept.require_teacher()), logits(Mine().model))
    with pytest.raises(UserError, match="keep_teacher = True"):
        lost.require_teacher()


# --- the loss and the optimizers -------------------------------------------------------------


def test_the_loss_is_a_callbacks_before_it_is_the_modules():
    module = Mine()
    batch = OwnData().calibration_batches(2, 8, 2)[0]
    output = module.net(batch)
    plain = cross_entropy(output.logits, batch["labels"])
    assert_same(module.loss(batch, output), plain)
    own = torch.tensor(3.0)
    assert module.loss(batch, output, own) is own
    seen: list[Any] = []

    def term(module: Any, batch: Any, output: Any) -> Tensor:
        seen.extend((module, batch, output))
        return plain + 1

    module.loss_term = term
    assert_same(module.loss(batch, output, own), plain + 1)
    assert all(a is b for a, b in zip(seen, (module, batch, output), strict=True))


def test_a_loss_must_be_asked_for_by_the_first_batch_of_each_callback():
    module = Mine()
    batch = OwnData().calibration_batches(2, 8, 2)[0]
    module.on_before_backward(torch.zeros(()))
    module.loss_term = lambda module, batch, output: torch.zeros(())
    with pytest.raises(UserError, match="expected training_step of Mine"):
        module.on_before_backward(torch.zeros(()))
    module.loss(batch, SimpleNamespace(logits=None))
    module.on_before_backward(torch.zeros(()))
    module.loss_term = lambda module, batch, output: torch.zeros(())
    with pytest.raises(UserError, match="expected training_step of Mine"):
        module.on_before_backward(torch.zeros(()))


def test_a_callbacks_optimizers_cover_the_modules_for_a_time():
    module = Mine()
    module.optimization_of = lambda of: ("a callback's", of)
    assert module.configure_optimizers() == ("a callback's", module)
    module.optimization_of = None
    assert type(module.configure_optimizers()) is torch.optim.SGD


# --- what is refused -------------------------------------------------------------------------


class Stale(Mine):
    """Trains what it had at the start."""

    def build(self) -> None:
        super().build()
        self.trained = list(self.parameters())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trained, lr=0.1)


def test_an_optimizer_of_parameters_that_are_gone_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="Stale to collect the parameters each time"):
        fit(Stale(), tmp_path)


class Empty(Prunable, Base):
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        raise AssertionError("training began")


def outside(module: Any) -> None:
    module.adopt(tiny_model("llama"))


def taken(name: str, value: Any) -> Any:
    def put(module: Any) -> None:
        module.net = tiny_model("llama")
        module.adopt(module.net)
        setattr(module, name, value)

    return put


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda module: None, "expected Empty to have a language model, got none; call self.adopt"),
        (outside, "expected the adopted model to be part of Empty, got one that is not; assign"),
        (taken("model", nn.Linear(1, 1)), "expected Empty.model to be the adopted .* got a Linear"),
        (taken("teacher", nn.Linear(1, 1)), "expected Empty.teacher to be that of Prunable, got a"),
        (taken("loss", nn.CrossEntropyLoss()), "expected Empty.loss .*got a CrossEntropyLoss; ren"),
        (taken("export", print), "expected Empty.export to be that of Prunable, got a builtin"),
    ],
)
@pytest.mark.parametrize("callback", [wanda, LoRARecovery])
def test_a_module_that_offers_no_model_of_its_own_is_refused(
    tmp_path: Path, build: Any, message: str, callback: Any
):
    module = Empty()
    module.other = nn.Linear(2, 2)
    build(module)
    with pytest.raises(UserError, match=message):
        fit(module, tmp_path, callback())
    assert module.phase == "dense"


def test_a_wrapper_must_not_have_the_models_name():
    module, model = Prunable(), tiny_model("llama")
    module.model = Tempered(model)
    with pytest.raises(UserError, match=r"Prunable.model .* got a Tempered; rename yours"):
        module.adopt(model)


def test_a_second_model_is_refused():
    module = Mine()
    with pytest.raises(UserError, match="expected one language model in a Mine, got a second"):
        module.adopt(tiny_model("llama"))


def test_a_checkpoint_without_our_part_is_refused():
    with pytest.raises(UserError, match="expected a checkpoint of a Prunable module"):
        Mine().on_load_checkpoint({"base": 1.0})


def test_the_order_of_the_bases_matters():
    bases: Any = (LightningModule, Prunable)
    with pytest.raises(TypeError, match=r"MRO|method resolution order"):
        type("Wrong", bases, {})


def test_other_stages_take_any_module(tmp_path: Path):
    class Other(LightningModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", 1.0)

    trainer = make_trainer(tmp_path, [wanda(), LoRARecovery()], limit_val_batches=1)
    assert trainer.validate(Other(), OwnData(), verbose=False) == [{"seen": 1.0}]


def test_spoiled_weights_do_not_replace_a_checkpoint() -> None:
    module = PrunableLM.from_model(tiny_model("llama"))
    module.on_save_checkpoint({})
    with torch.no_grad():
        module.model.get_parameter("model.norm.weight")[3] = torch.inf
    with pytest.raises(UserError, match=r"expected finite weights, got NaN or infinity in model\."):
        module.on_save_checkpoint({})


def test_a_checkpoint_of_other_weights_of_the_same_shape_is_refused() -> None:
    checkpoint: dict[str, Any] = {}
    first, other = (PrunableLM.from_model(tiny_model("llama")) for _ in range(2))
    first.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)  # the same weights
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").add_(0.1)
    with pytest.raises(UserError, match="a model of the same shape with other weights"):
        PrunableLM.from_model(model).on_load_checkpoint(checkpoint)


def test_an_output_without_logits_is_told() -> None:
    module = PrunableLM.from_model(tiny_model("llama"))
    with pytest.raises(UserError, match=r"an output with logits .*, got Tensor; hand that on$"):
        module.loss({}, torch.zeros(1, 2, 3))
