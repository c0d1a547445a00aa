"""Tiny models, texts and trainers: fits that take a fraction of a second on a CPU."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lit_prune import Layout, Structure, TextDataModule
from lit_prune.structure import cut
from tests.structure.tiny import tiny_model

VOCABULARY = 61


def make_tokenizer() -> Any:
    """A word tokenizer of as many words as the tiny models know."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(VOCABULARY - 3))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_model(folder: Path, name: str = "llama", **options: Any) -> str:
    """Write a tiny model and its tokenizer; returns the folder."""
    model: Any = tiny_model(name, **options)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_text(folder: Path, words: int = 1200) -> str:
    """Write random words with some order in them; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    path, word, text = folder / "text.txt", 0, []
    for _ in range(words):
        word = (word + draw.choice([1, 1, 1, 2, 7])) % (VOCABULARY - 3)
        text.append(f"w{word}")
    path.write_text(" ".join(text), encoding="utf-8")
    return str(path)


def make_data(folder: Path, **options: Any) -> TextDataModule:
    """Some hundred training windows of 8 tokens, and 4 validation windows of 16."""
    train = options.pop("train", None) or write_text(folder)
    defaults = {"length": 8, "batch_size": 2, "window": 16, "validation_tokens": 64}
    return TextDataModule(train, cache_dir=str(folder / "cache"), **{**defaults, **options})


def make_trainer(
    folder: Path, callbacks: Sequence[Callback] = (), max_steps: int = 3, **options: Any
) -> Trainer:
    """A silent trainer on the CPU that writes nothing of its own."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        max_steps=max_steps,
        **{**defaults, **options},
    )


def token_ids(rows: int = 2, length: int = 12) -> Tensor:
    """Token ids [rows, length] without the special ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def logits(model: Any) -> Tensor:
    """The model's logits of `token_ids`, in eval mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        result = model(input_ids=token_ids(), use_cache=False).logits
    for module, mode in modes.items():
        module.training = mode
    return result


def uneven(structure: Structure, *, drop_layer: bool = False) -> Layout:
    """A layout with other numbers and units in each layer."""
    layout = Layout.full(structure.widths)
    for number, sizes in enumerate(structure.widths.layers):
        channels = sizes["channel"] - 3 - number
        keep = {"channel": torch.arange(sizes["channel"])[-channels:]}
        if number == 0 and sizes["group"] > 1:
            keep["group"] = torch.arange(1, sizes["group"])
        layout = layout.replace_layer(number, keep)
    if drop_layer:
        return Layout(layout.of, layout.hidden, (layout.layers[0], *layout.layers[2:]))
    return layout


class CutAt(Callback):
    """Cuts unevenly in the middle of a fit, or at its start for step 0."""

    def __init__(self, step: int = 0, **options: Any) -> None:
        self.step, self.options = step, options

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step == 0:
            self._cut(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        accumulating = trainer.fit_loop._should_accumulate()
        if trainer.global_step >= self.step and not accumulating:
            self._cut(trainer, pl_module)

    def _cut(self, trainer: Trainer, module: Any) -> None:
        if module.phase != "dense":
            return

        def change() -> Layout:
            layout = uneven(module.structure, **self.options)
            cut(module.model, module.structure, layout)
            return layout

        module.recut(trainer, change)


class Watch(Callback):
    """Notes what can only be seen in the middle of a fit.

    Attributes:
        batches: The training batches.
        rates: The learning rate of each optimizer step.
        start: Parameters when training starts, by name.
        end: Parameters when it ends, before anything is merged.
        kept: The optimizer's state when training ends.
        logits: Logits of `token_ids` when everything is done.
    """

    def __init__(self) -> None:
        self.batches: list[Mapping[str, Tensor]] = []
        self.rates: list[float] = []
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}
        self.kept: Any = None
        self.logits: Tensor = torch.empty(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = parameters(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end = parameters(pl_module)
        self.kept = trainer.optimizers[0].state_dict()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logits = logits(pl_module.model)


def parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, by name."""
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Hold that nested plain types and tensors are equal to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: {(a.double() - b.double()).abs().max()}"
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert a == b, where
