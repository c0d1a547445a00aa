from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.callbacks import Distillation
from lit_prune.masks.adaptation import DecoderCount, decide
from lit_prune.masks.bottleneck import Gates, Objective, mask_optimizer
from lit_prune.masks.folding import fold
from lit_prune.masks.gating import attach
from lit_prune.recovery.distillation import cross_entropy
from lit_prune.scores import vib
from lit_prune.structure import Structure, cut, settle
from lit_prune.structure.counting import count_actual, unique_labels
from tests.structure.tiny import tiny_model
from tests.tiny_fit import (
    Watch,
    assert_same,
    make_data,
    make_tokenizer,
    make_trainer,
    parameters,
)
from tests.vib_fit import fitted, pruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:expected learning rates that sum"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:expected to remove"),
]


class Look(Callback):
    """Notes what is only so while masks train; listed behind the pruning."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.modes: list[tuple[Any, ...]] = []
        self.losses: list[Any] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        model = pl_module.model
        self.modes.append(
            (
                pl_module.gates is not None,
                any(m.training for m in model.modules()),
                any(p.requires_grad for p in model.parameters()),
                any(m._forward_pre_hooks for m in model.modules()),
            )
        )
        self.losses.append(pl_module.loss_term)
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama-tied", {}),
        ("gpt2", {"weight_update": False, "kl_scale": 10.0}),
        ("llama", {"threshold": "zero", "protected_layers": [1]}),
        ("llama", {"axes": ["group", "channel"], "multiple": 0, "mean_rate": 0.1}),
        ("llama", {"axes": ["hidden"], "norm_rescale": "none"}),
    ],
)
def test_a_fit_does_what_the_functions_do(tmp_path: Path, name: str, how: Any) -> None:
    steps, rate, sparsity = 30, 0.6, 0.3
    options = {"keep_best": False, "rate": rate, "seed": 5, **how}
    watch = Watch()
    callback = pruning(sparsity, steps, **options)
    module = fitted(tmp_path, callback, watch, name=name, steps=steps)

    model: Any = tiny_model(name).requires_grad_(False)
    structure = Structure.of(model)
    axes = how.get("axes", ["group", "channel", "hidden"])
    gates = Gates(structure.widths, axes, how.get("protected_layers", ()), 5)
    counted = DecoderCount(unique_labels(model, structure), structure.widths)
    weights = vib.kl_weights(gates.units(), 3, sparsity, how.get("kl_scale", "auto"))
    objective = Objective(counted, weights, sparsity, steps)
    optimizer, schedule = mask_optimizer(gates, rate, steps, how.get("mean_rate"))
    norms = how.get("norm_rescale", "masked")
    with attach(gates, model, structure, norm_rescale=norms):
        for step, batch in enumerate(watch.batches):
            gates.reseed(0, step)
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            loss = cross_entropy(model(**inputs, use_cache=False).logits, batch["labels"])
            terms = objective(gates, step)
            optimizer.zero_grad()
            (loss + terms["kl"] + terms["penalty"]).backward()
            torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    assert len(watch.batches) == steps
    ratios = gates.unpacked(gates.log_alpha(), math.inf)
    threshold, multiple = how.get("threshold", "exact"), how.get("multiple", 8)
    decision = decide(ratios, counted, sparsity, threshold=threshold, multiple=multiple)
    assert module.layout.to_dict() == decision.layout.to_dict()
    if how.get("weight_update", True):
        fold(model, structure, gates.unpacked(gates.mu, 1.0), decision.layout)
    cut(model, structure, decision.layout, norms)
    settle(model, structure, decision.layout)
    assert_same(parameters(module.model), parameters(model))
    (entry,) = module.history
    before = count_actual(tiny_model(name), Structure.of(tiny_model(name)), decoder=True)
    after = count_actual(model, structure, decoder=True)
    assert entry["sparsity"]["decoder"] == pytest.approx(1 - after / before)
    assert entry["sparsity"]["decoder"] == pytest.approx(decision.sparsity)
    assert entry["options"]["sparsity_before_rounding"] == pytest.approx(decision.before)
    json.dumps(entry)


def test_masks_train_alone_and_then_all_else(tmp_path: Path) -> None:
    look, watch = Look(), Watch()
    module = fitted(tmp_path, pruning(), Distillation(), look, watch)  # gpt2 has dropout
    masks, model = (True, False, False, True), (False, True, True, False)
    assert look.modes == [masks] * 6 + [model] * 2
    assert watch.rates == pytest.approx([0.5 * (1 - i / 6) for i in range(6)] + watch.rates[6:])
    assert max(watch.rates[6:]) == 1e-2
    assert len(set(map(str, look.losses[:6]))) == 1
    assert isinstance(look.losses[6], Distillation)
    last = look.logged[5]
    assert {"masks/task", "masks/kl", "masks/penalty", "masks/sparsity"} <= last.keys()
    parts = last["masks/task"] + last["masks/kl"] + last["masks/penalty"]
    assert last["train/dense_loss"] == pytest.approx(parts, rel=1e-5)
    assert module.gates is None
    assert module.optimization_of is None
    assert module.phase == "pruned"
    assert module.seconds["train_masks"] > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.model.modules())


def test_weights_stay_the_dense_ones_but_for_their_cut(tmp_path: Path) -> None:
    callback = pruning(weight_update=False, axes=["channel"], sparsity=0.2)
    module = fitted(tmp_path, callback, name="llama", steps=6)
    dense = tiny_model("llama").state_dict()
    for layer, unit in enumerate(module.layout.layers):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(module.model.get_parameter(name), dense[name][:, unit.keep["channel"]])


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    norms: list[float] = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if pl_module.gates is not None:
                grads = [p.grad for p in pl_module.gates.parameters()]
                norms.append(torch.cat([g for g in grads if g is not None]).norm().item())

    fitted(tmp_path, pruning(kl_scale=1e6), Norm())
    assert len(norms) == 6
    assert all(norm == pytest.approx(1, rel=1e-4) for norm in norms)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_are_those_of_the_optimizer(tmp_path: Path, accumulate: int) -> None:
    watch = Watch()
    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    trainer = make_trainer(
        tmp_path, [pruning(steps=4), watch], 5, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert len(watch.rates) == 5
    assert len(watch.batches) == 5 * accumulate
    assert watch.rates[:4] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    assert module.phase == "pruned"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_best_masks_are_cut_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    from lit_prune.masks import masking

    monkeypatch.setattr("lit_prune.callbacks.vib._EVERY", 2)
    monkeypatch.setattr(masking, "_NEAR", (-1.0, 1.0))
    seen: list[tuple[float, Tensor]] = []
    compare = masking.MaskTraining.compare

    def noting(self: Any, *args: Any) -> float:
        loss = compare(self, *args)
        seen.append((loss, self.gates.mu.detach().clone()))
        return loss

    monkeypatch.setattr(masking.MaskTraining, "compare", noting)
    used: list[Tensor] = []
    folding = masking.MaskTraining.fold

    def folded(self: Any, layout: Any) -> None:
        used.append(self.gates.mu.detach().clone())
        folding(self, layout)

    monkeypatch.setattr(masking.MaskTraining, "fold", folded)
    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    trainer = make_trainer(
        tmp_path, [pruning(steps=9, rate=1.0)], 9, accumulate_grad_batches=accumulate
    )
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert len(seen) == 5  # after 2, 4, 6 and 8 steps, and at the end
    assert len({loss for loss, _ in seen}) == 5
    assert torch.equal(used[0], min(seen, key=lambda entry: entry[0])[1])


def test_without_comparison_no_calibration_text_is_needed(tmp_path: Path) -> None:
    class Plain(type(make_data(tmp_path))):  # type: ignore[misc]
        calibration_batches: Any = None

    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    data = make_data(tmp_path)
    data.__class__ = Plain
    make_trainer(tmp_path, [pruning(keep_best=False)], 6).fit(module, datamodule=data)
    assert module.phase == "pruned"


def test_a_restoration_sees_the_updated_model(tmp_path: Path) -> None:
    for restoration in ("least_squares", "bias"):
        module = fitted(
            tmp_path / restoration,
            pruning(restoration=restoration),
            name="llama",
            steps=6,
        )
        assert all(p.isfinite().all() for p in module.model.parameters())
        (entry,) = module.history
        assert entry["options"]["restoration"] == restoration
        assert entry["sparsity"]["decoder"] == pytest.approx(0.4, abs=0.15)


def test_stock_takes_the_same_number_everywhere(tmp_path: Path) -> None:
    module = fitted(
        tmp_path, pruning(axes=["group", "channel"], multiple=0), name="llama", stock=True
    )
    assert module.is_stock
    widths = module.structure.widths
    assert widths.uniform("channel") == module.model.config.intermediate_size
    assert module.history[0]["sparsity"]["decoder"] == pytest.approx(0.4, abs=0.03)


def test_one_seed_one_result(tmp_path: Path) -> None:
    runs = [fitted(tmp_path, pruning(seed=seed), name="llama") for seed in (1, 1, 2)]
    assert_same(parameters(runs[0].model), parameters(runs[1].model))
    assert runs[0].layout.to_dict() == runs[1].layout.to_dict() != runs[2].layout.to_dict()


@pytest.mark.parametrize("multiple", [0, 8])
def test_what_is_below_the_threshold_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], multiple: int
) -> None:
    fitted(tmp_path, pruning(multiple=multiple, keep_best=False), name="llama", steps=6)
    line = next(x for x in capsys.readouterr().err.splitlines() if "below the threshold" in x)
    assert ("with widths in multiples of 8" in line) == bool(multiple)
    assert ("multiples" in line) == bool(multiple)
