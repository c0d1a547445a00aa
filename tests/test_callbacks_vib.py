from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_prune import PrunableLM
from lit_prune.adaptation import DecoderCount, decide
from lit_prune.bottleneck import Gates, Objective, mask_optimizer
from lit_prune.callbacks import Distillation, LoRARecovery, RandomState
from lit_prune.callbacks.vib import VIBPruning
from lit_prune.distillation import cross_entropy
from lit_prune.errors import UserError
from lit_prune.folding import fold
from lit_prune.gating import attach
from lit_prune.scores import vib
from lit_prune.structure import Structure, cut, settle
from lit_prune.structure.counting import count_actual, unique_labels
from tests.structure.tiny import tiny_model
from tests.tiny_fit import (
    Watch,
    assert_same,
    logits,
    make_data,
    make_tokenizer,
    make_trainer,
    parameters,
    save_model,
    write_text,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:expected learning rates that sum"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
SMALL: dict[str, Any] = {"samples": 4, "length": 16, "batch_size": 2, "multiple": 8}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pruning(sparsity: float = 0.4, steps: int = 6, **options: Any) -> VIBPruning:
    return VIBPruning(sparsity, steps=steps, **{"rate": 0.5, **SMALL, **options})


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


def fitted(
    folder: Path,
    callback: VIBPruning,
    *others: Any,
    name: str = "gpt2",
    steps: int = 8,
    **more: Any,
) -> PrunableLM:
    module = PrunableLM.from_model(tiny_model(name), make_tokenizer(), learning_rate=1e-2, **more)
    trainer = make_trainer(folder, [callback, *others], steps)
    trainer.fit(module, datamodule=make_data(folder))
    return module


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama-tied", {}),
        ("gpt2", {"weight_update": False, "kl_scale": 10.0}),
        ("llama", {"threshold": "zero", "protected_layers": [1]}),
        ("llama", {"axes": ["group", "channel"], "multiple": 0, "norm_rescale": "none"}),
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
    optimizer, schedule = mask_optimizer(gates, rate, steps)
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
    from lit_prune import masking

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


def fit(folder: Path, source: str, ckpt_path: str | None = None, **options: Any) -> Any:
    module, watch = PrunableLM(source, dtype="float32", learning_rate=1e-2), Watch()
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    steps: list[Any] = [RandomState(), pruning(steps=4, **options), LoRARecovery(rank=2)]
    trainer = make_trainer(
        folder, [*steps, Distillation(), watch, saver], 6, enable_checkpointing=True
    )
    data = make_data(folder.parent)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, watch


def test_a_resumed_fit_ends_the_same(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense", "llama-tied")
    module, watch = fit(tmp_path / "first", source)
    for step in (1, 3, 4, 5):
        path = str(tmp_path / "first" / f"step={step}.ckpt")
        again, other = fit(tmp_path / f"again{step}", source, path)
        assert_same(other.end, watch.end)
        assert other.rates == pytest.approx(watch.rates[step:])
        assert again.layout.to_dict() == module.layout.to_dict()
        assert again.history == module.history
        assert torch.equal(logits(again.model), logits(module.model))


def test_masks_of_other_units_are_not_gone_on_with(tmp_path: Path) -> None:
    source = save_model(tmp_path / "dense", "llama-tied")
    fit(tmp_path / "first", source)
    path = str(tmp_path / "first" / "step=2.ckpt")
    with pytest.raises(UserError, match="expected the axes, protected_layers and seed") as caught:
        fit(tmp_path / "again", source, path, protected_layers=[1])
    assert "\n" not in str(caught.value)


def test_a_fit_that_is_broken_off_leaves_a_whole_model(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any, **options: Any) -> None:
            if trainer.global_step == 2:
                raise ValueError("stop")

    module = PrunableLM.from_model(tiny_model("llama"), make_tokenizer())
    with pytest.raises(ValueError, match="stop"):
        make_trainer(tmp_path, [pruning(), Stop()], 8).fit(module, datamodule=make_data(tmp_path))
    assert torch.equal(logits(module.model), logits(tiny_model("llama")))
    assert all(p.requires_grad for p in module.model.parameters())
    assert module.optimization_of is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"axes": ["query"]}, "axes out of group, channel, hidden for VIB, got query"),
        ({"axes": []}, "axes out of group, channel, hidden for VIB, got none"),
        ({"steps": 0}, "steps of at least 1 and a rate above 0, got 0"),
        ({"rate": 0.0}, "steps of at least 1 and a rate above 0, got"),
        ({"rate": math.nan}, "steps of at least 1 and a rate above 0, got"),
        ({"kl_scale": -1.0}, "a kl_scale of at least 0 or auto, got -1"),
        ({"kl_scale": "full"}, "a kl_scale of at least 0 or auto, got 'full'"),
        ({"multiple": 7}, "a multiple out of 0, 8, 64, 128, 256, got 7"),
        ({"threshold": "half"}, "one of exact, zero, got 'half'"),
        ({"norm_rescale": "calibrated"}, "one of masked, none, got 'calibrated'"),
        ({"sparsity": 1.0}, "a sparsity from 0 to below 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: Mapping[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"expected {text}") as caught:
        VIBPruning(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "module", "text"),
    [
        ("llama", {"sparsity": 0.95, "multiple": 64}, {}, "can reach, got 0.95; the most is"),
        ("llama", {"protected_layers": [3]}, {}, "protected layers from 0 to 2, got 3"),
        (
            "llama",
            {"protected_layers": [1], "axes": ["group", "channel"]},
            {"stock": True},
            "no protected layers under --stock",
        ),
        ("llama", {}, {"stock": True}, "expected axes under --stock .*got 'hidden'"),
        ("bloom", {}, {"stock": True}, "--stock that the config of bloom"),
        ("falcon-7b", {}, {}, "units to spare, got 'group'"),
        ("llama", {"steps": 9}, {}, "a fit of at least 9 steps"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    tmp_path: Path, name: str, options: Any, module: Any, text: str
) -> None:
    wrapped = PrunableLM.from_model(tiny_model(name), make_tokenizer(), **module)
    trainer = make_trainer(tmp_path, [pruning(**options)], 8)
    with pytest.raises(UserError, match=text) as caught:
        trainer.fit(wrapped, datamodule=make_data(tmp_path))
    assert "\n" not in str(caught.value)
    assert trainer.global_step == 0
    assert wrapped.gates is None
    assert_same(parameters(wrapped.model), parameters(tiny_model(name)))


@pytest.mark.filterwarnings("default:expected learning rates that sum")
def test_too_small_a_sum_of_rates_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"sum up to 20 or more, got 1.8 in 6 steps from 0.5"):
        fitted(tmp_path, pruning())


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    found = VIBPruning().options()
    expected = {
        "axes": ["group", "channel", "hidden"],
        "threshold": "exact",
        "multiple": 128,
        "weight_update": True,
        "rate": 0.05,
        "kl_scale": "auto",
    }
    assert expected.items() <= found.items()
    assert VIBPruning(0.6).options()["rate"] == 0.1
    assert not {"allocation", "start", "iterations", "every"} & found.keys()


def test_two_processes_train_the_same_masks_with_other_noise(tmp_path: Path) -> None:
    save_model(tmp_path / "dense", "llama")
    write_text(tmp_path)
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "tests" / "vib_ranks.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(one["mu"]) == 4
    assert not set(one["seeds"]) & set(two["seeds"])
    for key in ("mu", "layout", "parameters"):
        assert_same(one[key], two[key])
