"""PrunableLM in a real Trainer: cutting in a fit, dtypes, export, checkpoints, measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_prune import PrunableLM, load_pruned
from lit_prune.callbacks import ExportCheckpoint, FASPPruning, LoRARecovery
from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import perplexity
from lit_prune.recovery.distillation import cross_entropy
from lit_prune.recovery.schedule import warmed_up
from lit_prune.structure import cut
from tests.structure.tiny import tiny_model
from tests.tiny_fit import (
    CutAt,
    Watch,
    assert_same,
    logits,
    make_data,
    make_tokenizer,
    make_trainer,
    parameters,
    save_model,
    token_ids,
    uneven,
)


def wrap(name: str = "llama", seed: int = 0, **options: Any) -> PrunableLM:
    model = tiny_model(name, seed=seed)
    return PrunableLM.from_model(model, make_tokenizer(), **{"learning_rate": 1e-2, **options})


def fasp(**options: Any) -> FASPPruning:
    return FASPPruning(**{"samples": 8, "length": 16, **options})


class Events(Callback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_before_cut(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append(f"before {pl_module.phase}")

    def on_after_cut(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.append(f"after {pl_module.phase}")


# --- cutting in a fit ------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_cut_in_the_middle_trains_like_a_loop_by_hand(
    tmp_path: Path, accumulate: int, precision: Any
):
    module, watch, events = wrap(), Watch(), Events()
    model: Any = tiny_model("llama")
    trainer = make_trainer(
        tmp_path,
        [CutAt(2), watch, events],
        max_steps=5,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        precision=precision,
    )
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert trainer.global_step == 5
    assert {"train/dense_loss", "train/pruned_loss"} <= trainer.logged_metrics.keys()
    assert events.seen == ["before dense", "after pruned"]
    in_optimizer = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert [id(p) for p in in_optimizer] == [id(p) for p in module.parameters()]

    structure = PrunableLM.from_model(model).structure
    if precision == "bf16-true":
        PrunableLM.from_model(model).to(torch.bfloat16)
    batches, rates = iter(watch.batches), []
    for steps in (2, 3):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        # the second schedule is one over the steps that are left
        schedule = warmed_up(optimizer, 5 if steps == 2 else 3, 0.03)
        for _ in range(steps):
            for _ in range(accumulate):
                batch = next(batches)
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    output = model(input_ids=batch["input_ids"], use_cache=False)
                    loss = cross_entropy(output.logits, batch["labels"])
                (loss / accumulate).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if steps == 2:
            cut(model, structure, uneven(structure))
    assert watch.rates == rates
    assert next(batches, None) is None
    assert_same(module.model.state_dict(), model.state_dict())


def test_cut_at_the_start_of_a_fit_trains_what_is_left(tmp_path: Path):
    module, watch = wrap(), Watch()
    trainer = make_trainer(tmp_path, [fasp(), watch], max_steps=3)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.phase == "pruned"
    assert watch.start.keys() == watch.end.keys()
    assert all(not torch.equal(watch.start[name], watch.end[name]) for name in watch.start)
    assert sum(value.numel() for value in watch.start.values()) < 25_524
    live = {id(parameter) for parameter in module.parameters()}
    assert {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]} == live
    layout = module.layout.widths()
    assert layout == module.structure.widths


def test_the_decision_and_the_repair_do_not_depend_on_the_trainers_precision(tmp_path: Path):
    results = []
    for precision in ("32-true", "bf16-true", "bf16-mixed"):
        model: Any = tiny_model("llama", dtype=torch.bfloat16)
        module = PrunableLM.from_model(model, make_tokenizer())
        callbacks = [fasp(axes=["group", "channel"], sparsity=0.4)]
        trainer = make_trainer(tmp_path / precision, callbacks, max_steps=0, precision=precision)
        trainer.fit(module, datamodule=make_data(tmp_path))
        results.append((module.layout.to_dict(), dict(module.model.state_dict())))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_failing_cut_is_not_taken_for_done(tmp_path: Path):
    module = wrap()
    before = parameters(module)
    trainer = make_trainer(tmp_path, [fasp(sparsity=0.99)])
    with pytest.raises(UserError, match="expected a sparsity"):
        trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.phase == "dense"
    assert module.history == []
    assert_same(parameters(module), before)


# --- dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_computed_buffers_alone(name: str, dtype: torch.dtype):
    module = wrap(name)
    before = {key: value.clone() for key, value in module.named_buffers()}
    assert before
    module.to(dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert_same(dict(module.named_buffers()), before)


# stock: what FASP can cut so that the stock config expresses it
FAMILIES = ["llama", "llama-tied", "gemma3", "phi3", "bloom", "falcon-rw", "gpt2"]
STOCK = [name for name in FAMILIES if name not in {"bloom", "falcon-rw"}]
DTYPES = [("float32", "32-true"), ("bfloat16", "32-true"), ("float32", "bf16-true")]


def check_export(folder: Path, watch: Watch, *, stock: bool) -> None:
    options: dict[str, Any] = {"dtype": "auto"}
    assert_same(logits(load_pruned(folder, **options)), watch.logits)
    if not stock:
        options["trust_remote_code"] = True
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert_same(logits(loaded), watch.logits)


@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("name", STOCK)
def test_logits_in_the_fit_are_those_of_the_stock_export(
    tmp_path: Path, name: str, dtype: Any, precision: Any
):
    source = save_model(tmp_path / "dense", name)
    module, watch = PrunableLM(source, dtype=dtype, stock=True), Watch()
    callbacks = [fasp(), LoRARecovery(rank=2), ExportCheckpoint(), watch]
    trainer = make_trainer(tmp_path / "run", callbacks, max_steps=2, precision=precision)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert module.is_stock
    plain = (dtype, precision) == ("float32", "32-true")
    assert module.model.dtype == (torch.float32 if plain else torch.bfloat16)
    check_export(tmp_path / "run" / "pruned", watch, stock=True)


@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_in_the_fit_are_those_of_the_uneven_export(
    tmp_path: Path, name: str, dtype: Any, precision: Any
):
    source = save_model(tmp_path / "dense", name)
    module, watch = PrunableLM(source, dtype=dtype, learning_rate=1e-2), Watch()
    callbacks = [CutAt(1, drop_layer=True), ExportCheckpoint(), watch]
    trainer = make_trainer(tmp_path / "run", callbacks, max_steps=3, precision=precision)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert not module.is_stock
    assert len(module.structure.layers(module.model)) == 2
    check_export(tmp_path / "run" / "pruned", watch, stock=False)


# --- training and measuring ------------------------------------------------------------------


class Gradients(Callback):
    """Notes gradients, and how often a layer was computed."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []
        self.calls = 0

    def _count(self, *args: Any) -> None:
        self.calls += 1

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        layer = pl_module.structure.layers(pl_module.model)[1]
        submodule = next(m for m in layer.modules() if type(m) is torch.nn.Linear)
        submodule.register_forward_hook(self._count)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        self.seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path, name: str, lora: bool):
    runs = []
    for enabled in (False, True):
        gradients = Gradients()
        callbacks = [fasp(), *([LoRARecovery(rank=2)] if lora else []), gradients]
        source = save_model(tmp_path / f"dense{enabled}", name)
        module = PrunableLM(source, dtype="float32", gradient_checkpointing=enabled)
        trainer = make_trainer(tmp_path / "run", callbacks, max_steps=2)
        trainer.fit(module, datamodule=make_data(tmp_path))
        assert gradients.calls == (4 if enabled else 2)
        assert all(gradient.any() for gradient in gradients.seen[1].values())
        assert all(("lora" in key) == lora for key in gradients.seen[0])
        runs.append(gradients.seen)
    assert_same(runs[0], runs[1])


def test_the_logged_perplexity_is_that_of_the_evaluation(tmp_path: Path):
    module, data = wrap(), make_data(tmp_path)
    data.sources["test"] = data.sources["train"]
    trainer = make_trainer(tmp_path, limit_val_batches=None)
    logged = [
        trainer.validate(module, datamodule=data, verbose=False)[0]["val/perplexity"],
        trainer.test(module, datamodule=data, verbose=False)[0]["test/perplexity"],
    ]
    for value, loader in zip(logged, [data.val_dataloader(), data.test_dataloader()], strict=True):
        assert value == pytest.approx(perplexity(module.model, loader).value, rel=1e-5)
    assert logged[0] != logged[1]


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_padding_changes_neither_loss_nor_perplexity(tmp_path: Path, name: str):
    module = wrap(name)
    rows = [token_ids(1, length) for length in (12, 7)]
    single = [{"input_ids": r, "attention_mask": r.ne(0).long(), "labels": r} for r in rows]
    padded = {
        key: torch.nn.utils.rnn.pad_sequence(
            [batch[key][0] for batch in single], batch_first=True, padding_value=value
        )
        for key, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    trainer = make_trainer(tmp_path, limit_val_batches=None)
    sources: list[Any] = [single, [padded]]
    values = [
        trainer.validate(module, DataLoader(source, batch_size=None), verbose=False)
        for source in sources
    ]
    assert values[0][0]["val/perplexity"] == pytest.approx(values[1][0]["val/perplexity"], rel=1e-5)
    module.log = lambda *args, **kwargs: None  # pyright: ignore[reportAttributeAccessIssue]
    losses = [module.training_step(batch, 0).item() for batch in single]
    mean = (losses[0] * 11 + losses[1] * 6) / 17
    assert module.training_step(padded, 0).item() == pytest.approx(mean, rel=1e-5)


def test_a_finished_module_is_for_use(tmp_path: Path):
    module = wrap("gpt2")  # which has dropout
    trainer = make_trainer(tmp_path, [ExportCheckpoint()], max_steps=1)
    trainer.fit(module, datamodule=make_data(tmp_path))
    assert not any(part.training for part in module.model.modules())
    assert_same(logits(module.model), module.model(input_ids=token_ids(), use_cache=False).logits)


def test_predicted_tokens(tmp_path: Path):
    module, data = wrap(), make_data(tmp_path)
    found: Any = make_trainer(tmp_path).predict(module, datamodule=data)
    batches = list(data.predict_dataloader())
    assert len(found) == len(batches)
    expected = module.model(input_ids=batches[0]["input_ids"]).logits.argmax(-1)
    assert_same(found[0], expected)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="expected a dtype out of auto, float32"):
        PrunableLM("anything", dtype="float8")  # pyright: ignore[reportArgumentType]
