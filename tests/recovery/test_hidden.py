"""Distillation on hidden states: which layers match, and the literal loss in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune import Layout, PrunableLM
from lit_prune.callbacks import Distillation, LoRARecovery
from lit_prune.errors import UserError
from lit_prune.recovery.hidden import HiddenStates, hidden_loss, matching_layers
from lit_prune.structure import cut
from lit_prune.structure.layout import LayerUnits, Widths
from tests.structure.tiny import tiny_model
from tests.tiny_fit import assert_same, make_data, make_trainer, save_model, token_ids


def layout_of(sources: list[int], hidden: list[int] | None = None) -> Layout:
    of = Widths({"hidden": 8}, [{"channel": 4}] * 6)
    kept = None if hidden is None else torch.tensor(hidden)
    return Layout(of, kept, tuple(LayerUnits(source) for source in sources))


def test_layers_match_by_where_they_come_from():
    layout = layout_of([0, 2, 3, 5])
    assert matching_layers(layout) == [(0, 0), (1, 2), (2, 3), (3, 5)]
    assert matching_layers(layout, 2) == [(1, 2), (3, 5)]
    assert matching_layers(layout, 3) == [(2, 3)]
    assert matching_layers(layout, 5) == []


def test_kept_features_are_compared():
    torch.manual_seed(0)
    student = [torch.randn(2, 3, 2, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(2, 3, 8) for _ in range(2)]
    labels = torch.tensor([[1, 1, 1], [-100, 1, -100]])  # predicted at (0,0), (0,1), (1,0)
    loss = hidden_loss(student, teacher, labels, layout_of([0, 1], [2, 5]))
    total = torch.zeros(())
    for ours, dense in zip(student, teacher, strict=True):
        for row, place in ((0, 0), (0, 1), (1, 0)):
            for mine, other in enumerate([2, 5]):
                total = total + (ours[row, place, mine] - dense[row, place, other]) ** 2
    torch.testing.assert_close(loss, total / (2 * 3 * 2))
    (gradient,) = torch.autograd.grad(loss, student[1])
    (expected,) = torch.autograd.grad(total / 12, student[1])
    torch.testing.assert_close(gradient, expected)


def test_states_are_recorded_once_and_in_order():
    model: Any = tiny_model("gpt2")
    layers = list(model.transformer.h)
    expected = model(input_ids=token_ids(), output_hidden_states=True).hidden_states
    hooks = [len(layer._forward_hooks) for layer in layers]  # transformers leaves its own
    recorder = HiddenStates([layers[2], layers[0]])
    model(input_ids=token_ids())
    last, first = recorder.take()
    torch.testing.assert_close(first, expected[1])
    torch.testing.assert_close(model.transformer.ln_f(last), expected[3])
    assert [len(layer._forward_hooks) for layer in layers] == hooks


class CutAll(Callback):
    """Drops a layer, channels and residual features before training."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.phase == "dense":
            pl_module.recut(trainer, lambda: self.change(pl_module))

    def change(self, module: Any) -> Layout:
        full = Layout.full(module.structure.widths)
        hidden = torch.arange(module.structure.widths.shared["hidden"])[3:]
        layout = Layout(full.of, hidden, (full.layers[0], full.layers[2]))
        cut(module.model, module.structure, layout)
        return layout


def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What each decoder layer gives, by hand."""
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _a, y: found.append(y[0] if isinstance(y, tuple) else y)
        )
        for layer in (model.model.layers if hasattr(model, "model") else model.transformer.h)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found


class Check(Callback):
    """Compares each step's loss with the literal one."""

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        self.pairs, self.expected = pairs, 0.0
        self.steps = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.model.eval()
        ours = outputs(pl_module.model, batch["input_ids"])
        pl_module.model.train()
        dense = outputs(pl_module.teacher, batch["input_ids"])
        kept = pl_module.layout.hidden
        means = [  # every token but the last predicts one
            (ours[a] - dense[b][..., kept])[:, :-1].square().mean() for a, b in self.pairs
        ]
        self.expected = float(torch.stack(means).mean())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps += 1
        assert self.expected > 1e-2
        assert float(outputs["loss"]) == pytest.approx(0.5 * self.expected, rel=1e-5)
        logged = trainer.logged_metrics["train/hidden"]
        assert float(logged) == pytest.approx(self.expected, rel=1e-5)


@pytest.mark.parametrize(("every", "pairs"), [(1, [(0, 0), (1, 2)]), (2, [(1, 2)])])
def test_the_loss_is_the_literal_one(tmp_path: Path, every: int, pairs: list[tuple[int, int]]):
    source = save_model(tmp_path / "dense")
    module, check = PrunableLM(source, dtype="float32", learning_rate=1e-2), Check(pairs)
    distillation = Distillation(task=0, kl=0, hidden=0.5, hidden_every=every)
    callbacks = [CutAll(), LoRARecovery(rank=2), check, distillation]
    trainer = make_trainer(
        tmp_path, callbacks, log_every_n_steps=1, limit_val_batches=1, val_check_interval=1
    )
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert check.steps == 3
    assert not any(layer._forward_hooks for layer in module.model.model.layers)
    teacher: Any = module.teacher
    assert not any(layer._forward_hooks for layer in teacher.model.layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path, name: str):
    class Gradients(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_before_optimizer_step(
            self, trainer: Trainer, pl_module: Any, optimizer: Any
        ) -> None:
            named = pl_module.named_parameters()
            self.seen.append({key: p.grad.clone() for key, p in named if p.grad is not None})

    runs = []
    for enabled in (False, True):
        source = save_model(tmp_path / f"dense{enabled}", name, **DROPLESS.get(name, {}))
        module = PrunableLM(source, dtype="float32", gradient_checkpointing=enabled)
        gradients = Gradients()
        callbacks = [CutAll(), LoRARecovery(rank=2), Distillation(task=0, kl=0, hidden=1)]
        trainer = make_trainer(tmp_path, [*callbacks, gradients], max_steps=2)
        trainer.fit(module, datamodule=make_data(tmp_path))
        assert any(gradient.any() for gradient in gradients.seen[0].values())
        runs.append(gradients.seen)
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("where", ["before the loss", "in the teacher", "after the loss"])
def test_a_fit_that_is_broken_off_leaves_no_hooks(tmp_path: Path, where: str):
    class Break(Callback):
        """Stops a fit; listed behind the distillation."""

        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, *args: Any, **options: Any
        ) -> None:
            if where == "before the loss":
                raise KeyError
            if where == "in the teacher":
                pl_module.teacher.lm_head.forward = None

        def on_train_batch_end(self, *args: Any, **options: Any) -> None:
            raise KeyError

    module = PrunableLM(save_model(tmp_path / "dense"), dtype="float32")
    trainer = make_trainer(tmp_path, [CutAll(), Distillation(hidden=1), Break()])
    with pytest.raises((KeyError, TypeError)):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.loss_term is None
    models: list[Any] = [module.model, module.teacher]
    for model in models:
        assert not any(layer._forward_hooks for layer in model.model.layers)


def test_a_step_that_asks_for_no_loss_leaves_no_hooks(tmp_path: Path):
    class Skips(PrunableLM):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch)
            return None

    module = Skips(save_model(tmp_path / "dense"), dtype="float32")
    callbacks = [CutAll(), Distillation(hidden=1)]
    trainer = make_trainer(tmp_path, callbacks, -1, max_epochs=1, limit_train_batches=3)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert not any(layer._forward_hooks for layer in module.model.model.layers)


DROPLESS: dict[str, Any] = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}


def test_wrong_settings_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="one of them above, got task 0"):
        Distillation(task=0, kl=0)
    with pytest.raises(UserError, match="hidden_every of at least 1, got 0"):
        Distillation(hidden=1, hidden_every=0)
    module = PrunableLM(save_model(tmp_path / "dense"), dtype="float32")
    trainer = make_trainer(tmp_path, [CutAll(), Distillation(hidden=1, hidden_every=3)])
    with pytest.raises(UserError, match="hidden_every of at most 2, the layers that are left"):
        trainer.fit(module, datamodule=make_data(tmp_path))
