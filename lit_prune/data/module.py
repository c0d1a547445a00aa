"""The text of a run: training, calibration, validation and test parts as Lightning loaders."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lit_prune.data.loader import ResumableLoader, ShuffledSampler, trainer_progress
from lit_prune.data.sources import locate, read_source, source_name
from lit_prune.data.tokens import Tokens, check_vocabulary, load_tokenizer, tokenize
from lit_prune.data.windows import (
    Batch,
    Collate,
    EvenData,
    Parts,
    TextDataset,
    cut,
    draw,
    require_items,
    split_parts,
)
from lit_prune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["train", "validation", "test"]


class _Text(NamedTuple):
    name: str
    split: str | None
    digest: str
    tokens: Tokens


#: Far from any seed that is given, so that turns of one seed are not those of the next.
_TURN = 1_000_003


class TextDataModule(LightningDataModule):
    """Text for pruning, recovery and evaluation, tokenised once.

    A source is a .txt or .md file, a folder of .txt files, a .jsonl or .json file (a text field, or
    instructions), `name[:config[:split]]` of the Hugging Face hub, or an embedded text (`sotu`,
    `pydoc`). The training source is cut in parts that don't overlap: training, calibration and,
    where no validation source is given, validation.

    Args:
        train: Source of training and calibration.
        validation: Source of validation, whole; None takes the end of `train`.
        test: Source of the test, whole.
        field: Field of .jsonl, .json and hub records that holds the text.
        length: Tokens of a training window; longer instruction rows are truncated to it.
        batch_size: Windows in a training batch, on each rank.
        window: Tokens of a validation and test window.
        validation_tokens: Evaluate on this many tokens from the start; None evaluates on all.
        calibration_share: Share of `train`, without its validation part, kept for calibration.
        validation_share: Share of `train` kept for validation where no source is given for that.
        seed: Of the training order and the calibration windows.
        num_workers: Loader processes.
        cache_dir: Folder of tokenised texts; None is the platform's cache folder.
        tokenizer: Hub id or folder of the tokenizer; None takes the model's.
    """

    def __init__(
        self,
        train: str = "sotu",
        validation: str | None = None,
        test: str | None = None,
        *,
        field: str = "text",
        length: int = 512,
        batch_size: int = 4,
        window: int = 2048,
        validation_tokens: int | None = 65536,
        calibration_share: float = 0.25,
        validation_share: float = 0.05,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        # a window of one token predicts nothing
        _at_least(2, length=length, window=window)
        _at_least(1, batch_size=batch_size)
        _at_least(0, seed=seed, num_workers=num_workers)
        if seed >= 2**32:  # with epoch or turn it must fit into a generator's 64 bits
            raise UserError(f"expected seed below {2**32}, got {seed}")
        if validation_tokens is not None:
            _at_least(window, validation_tokens=validation_tokens)
        if not 0 <= calibration_share < 1:
            raise UserError(
                f"expected calibration_share from 0 to below 1, got {calibration_share}"
            )
        if validation is None and not 0 < validation_share < 1:
            raise UserError(
                f"expected validation_share between 0 and 1, got {validation_share}; "
                "or give a validation text"
            )
        self.sources: dict[Role, str | None] = {
            "train": train,
            "validation": validation,
            "test": test,
        }
        self.field = field
        self.length = length
        self.batch_size = batch_size
        self.window = window
        self.validation_tokens = validation_tokens
        self.calibration_share = calibration_share
        self.validation_share = validation_share
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_source = tokenizer
        self._loaded: dict[Role, _Text] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer set by hand, else the argument's, else the model's.

        Raises:
            UserError: There is none, or the argument's can't be loaded.
        """
        found = self._find_tokenizer()
        if found is None:
            raise UserError(
                "expected a tokenizer, got none: the model has none; name one with data.tokenizer"
            )
        return found

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._loaded.clear()

    def _find_tokenizer(self) -> PreTrainedTokenizerBase | None:
        if self._tokenizer is None and self._tokenizer_source is not None:
            self._tokenizer = load_tokenizer(self._tokenizer_source)
        if self._tokenizer is not None:
            return self._tokenizer
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, "tokenizer", None)

    def prepare_data(self) -> None:
        """Refuses a source that isn't there, before anything is loaded."""
        stage = self.trainer.state.fn if self.trainer is not None else "fit"
        roles: tuple[Role, ...] = ("test",) if stage == "test" else ("validation",)
        if stage == "fit" or self.sources[roles[0]] is None:
            roles = ("train", *roles)
        for role in roles:
            source = self.sources[role]
            if source is not None:
                locate(source)

    def setup(self, stage: str) -> None:
        """Tokenises and checks what a stage needs, where the tokenizer is known by now."""
        if self._find_tokenizer() is not None:
            self.check(stage)

    def check(self, stage: str = "fit") -> None:
        """Refuses texts too short for what a stage will ask of them.

        Args:
            stage: `fit`, `validate`, `test` or `predict`.

        Raises:
            UserError: A part has no window, or training has no batch.
        """
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if getattr(module, "model", None) is not None and hasattr(module, "check_length"):
            module.check_length(self.window, "evaluation windows (data.window)")
            module.check_length(self.length, "training windows (data.length)")
        if stage == "fit" and self._trains():
            self._train_data()
        self._held_out("test" if stage == "test" else "validation")
        texts = {text.digest for text in self._loaded.values()}
        if stage == "fit" and len(texts) < len(self._loaded):
            rank_zero_warn("training and evaluation texts are the same: perplexity will flatter")

    def calibration_batches(
        self, samples: int, length: int, batch_size: int, turn: int = 0
    ) -> list[Batch]:
        """Draws calibration windows by seed, the same on every rank.

        Args:
            samples: Number of windows (rows, for instructions), all different.
            length: Tokens of a window; rows are truncated to it.
            batch_size: Windows in a batch; the last batch may have fewer.
            turn: Number of the draw, where a method draws anew each time it prunes.

        Returns:
            Batches of input_ids, attention_mask and labels, int64 [batch, length].

        Raises:
            UserError: The calibration part has fewer windows.
        """
        _at_least(1, samples=samples, batch_size=batch_size)
        _at_least(2, length=length)
        text = self._load("train")
        data = cut(text.tokens, self._parts(text.tokens).calibration, length)
        require_items(
            data,
            samples,
            part="calibration",
            name=text.name,
            option=f"number of samples or length, or raise calibration_share from "
            f"{self.calibration_share:g}",
        )
        items = [data[index] for index in draw(samples, len(data), self.seed + _TURN * turn)]
        collate = self._collate()
        return [collate(items[i : i + batch_size]) for i in range(0, samples, batch_size)]

    def train_dataloader(self) -> ResumableLoader:
        """Returns a shuffled loader that resumes at the next batch (`state_dict`)."""
        data = self._train_data()
        rank, world_size = self._rank()
        sampler = ShuffledSampler(
            len(data), self.batch_size, self.seed, rank=rank, world_size=world_size
        )
        with warnings.catch_warnings():
            # torchdata 0.11 calls a function that torch 2.13 has deprecated
            warnings.filterwarnings("ignore", message=".*set_vital")
            loader = ResumableLoader(
                data,
                batch_size=self.batch_size,
                sampler=sampler,
                drop_last=True,
                num_workers=self.num_workers,
                collate_fn=self._collate(),
                # of its own: each epoch draws a seed, which a resumed run would draw once more
                generator=torch.Generator().manual_seed(self.seed),
            )
        if self.trainer is not None:
            loader.progress = trainer_progress(self.trainer)
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation windows in order, one a batch.

        Where several processes share them, windows with no labels even out their numbers.
        """
        return self._evaluation_loader("validation", self._rank()[1])

    def test_dataloader(self) -> DataLoader[Batch]:
        """Returns the test windows in order, one a batch; see `val_dataloader`."""
        return self._evaluation_loader("test", self._rank()[1])

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Returns the validation windows in order, one a batch."""
        return self._evaluation_loader("validation", 1)  # which Lightning never repeats

    def protocol(self, role: Literal["validation", "test"] = "validation") -> dict[str, Any]:
        """Says what perplexity is measured on.

        Args:
            role: Which evaluation.

        Returns:
            Names of the texts, the window and the number of tokens in all windows.
        """
        name, data, split = self._held_out(role)
        return {
            "text": name,
            "split": split,
            "window": self.window,
            "tokens": data.tokens,
            "train": source_name(self.sources["train"] or ""),
        }

    def _load(self, role: Role) -> _Text:
        name = self.sources[role]
        if name is None:
            raise UserError(f"expected a {role} text, got none; name one with data.{role}")
        if role not in self._loaded:
            source = read_source(name, field=self.field, split=role)
            tokens = tokenize(source, self.tokenizer, field=self.field, cache_dir=self.cache_dir)
            self._loaded[role] = _Text(source.name, source.split, source.digest(), tokens)
        text = self._loaded[role]
        check_vocabulary(self.tokenizer, text.tokens.ids, self._vocab_size())
        return text

    def _parts(self, tokens: Tokens) -> Parts:
        share = self.validation_share if self.sources["validation"] is None else 0.0
        return split_parts(tokens.units, self.calibration_share, share)

    def _train_data(self) -> TextDataset:
        text = self._load("train")
        data = cut(text.tokens, self._parts(text.tokens).train, self.length)
        if self._trains():
            needed = self.batch_size * self._rank()[1]
            option = "length or batch_size"
            require_items(data, needed, part="training", name=text.name, option=option)
        return data

    def _held_out(self, role: Role) -> tuple[str, TextDataset, str]:
        inside = role == "validation" and self.sources["validation"] is None
        text = self._load("train" if inside else role)
        part = self._parts(text.tokens).validation if inside else range(text.tokens.units)
        data = cut(text.tokens, part, self.window, self.validation_tokens)
        require_items(data, 1, part=role, name=text.name, option="window")
        split = text.split or "whole text"
        if inside:
            split = f"last {100 * self.validation_share:g} % of the training text"
        return text.name, data, split

    def _evaluation_loader(self, role: Role, processes: int) -> DataLoader[Batch]:
        _, data, _ = self._held_out(role)
        return DataLoader(
            EvenData(data, processes),
            batch_size=1,
            num_workers=self.num_workers,
            collate_fn=self._collate(),
            generator=torch.Generator(),  # of its own, as for training
        )

    def _collate(self) -> Collate:
        tokenizer = self.tokenizer
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return Collate(int(next(token for token in known if isinstance(token, int))))

    def _rank(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _trains(self) -> bool:
        trainer = self.trainer
        return trainer is None or (trainer.max_steps != 0 and trainer.limit_train_batches != 0)

    def _vocab_size(self) -> int | None:
        module = self.trainer.lightning_module if self.trainer is not None else None
        size = getattr(module, "vocab_size", None)
        return size if isinstance(size, int) else None


def _at_least(least: int, **options: int) -> None:
    for name, value in options.items():
        if value < least:
            raise UserError(f"expected {name} of at least {least}, got {value}")
