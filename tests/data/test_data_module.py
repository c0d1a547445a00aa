"""TextDataModule: parts, batches and protocol, alone and in a Trainer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torchdata.stateful_dataloader import StatefulDataLoader

import lit_prune.data.module as module
from lit_prune.data import TextDataModule
from lit_prune.errors import UserError

SMALL: dict[str, Any] = {"length": 8, "window": 16, "batch_size": 2, "validation_share": 0.2}


@pytest.fixture
def make(tokenizer, text_file):
    def make(train=None, **options):
        data = TextDataModule(train or text_file(), **(SMALL | options))
        data.tokenizer = tokenizer
        return data

    return make


def plain(tokenizer, path):
    return tokenizer.backend_tokenizer.encode(Path(path).read_text(encoding="utf-8")).ids


def rows(loader):
    return [row.tolist() for batch in loader for row in batch["input_ids"]]


def test_train_calibration_and_validation_share_nothing(make, tokenizer, text_file):
    data = make()
    ids = plain(tokenizer, text_file())
    total = len(ids)
    train, held_out = rows(data.train_dataloader()), rows(data.val_dataloader())
    start = total - round(total * 0.2)
    middle = start - round(start * 0.25)
    calibration = [
        row.tolist() for batch in data.calibration_batches(9, 8, 4) for row in batch["input_ids"]
    ]
    windows = [ids[i : i + 8] for i in range(0, middle - 7, 8)]
    assert len(set(map(tuple, windows))) == len(windows)
    assert len(set(map(tuple, train)) & set(map(tuple, windows))) == len(train)
    assert len(train) == len(windows) // 2 * 2
    aligned = [ids[i : i + 8] for i in range(middle, start - 7, 8)]
    assert all(window in aligned for window in calibration)
    assert len(set(map(tuple, calibration))) == 9
    assert held_out == [ids[i : i + 16] for i in range(start, total - 15, 16)]


def test_calibration_batches_are_seeded_and_sized(make):
    first, again, other = (make(seed=s).calibration_batches(7, 8, 3) for s in (5, 5, 6))
    assert [tuple(batch["input_ids"].shape) for batch in first] == [(3, 8), (3, 8), (1, 8)]
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert set(first[0]) == {"input_ids", "attention_mask", "labels"}
    assert all(tensor.dtype == torch.int64 for tensor in first[0].values())


def test_the_largest_seed_draws_and_shuffles(make):
    data = make(seed=2**32 - 1)
    assert len(data.calibration_batches(7, 8, 3, turn=1000)) == 3
    loader = data.train_dataloader()
    assert rows(loader) != rows(loader)


def test_each_turn_draws_anew(make):
    def windows(seed, *turn):
        (batch,) = make(seed=seed).calibration_batches(6, 8, 6, *turn)
        return [tuple(row) for row in batch["input_ids"].tolist()]

    turns = [windows(5, turn) for turn in range(4)]
    assert turns == [windows(5, turn) for turn in range(4)]
    assert turns[0] == windows(5)
    assert len(set(map(tuple, turns))) == 4
    assert all(len(set(turn)) == 6 for turn in turns)
    # nor is a turn that of another seed
    assert not {tuple(windows(seed)) for seed in range(4, 10)} & set(map(tuple, turns[1:]))


def test_the_training_loader_is_stateful_and_resumes(make):
    loader = make().train_dataloader()
    assert isinstance(loader, StatefulDataLoader)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    rest = [batch["input_ids"] for batch in iterator]
    resumed = make().train_dataloader()
    resumed.load_state_dict(state)
    again = [batch["input_ids"] for batch in resumed]
    assert len(rest) == len(loader) - 1 == len(again)
    assert all(torch.equal(one, two) for one, two in zip(rest, again, strict=True))


def test_validation_has_windows_of_its_own_source(make, tokenizer, text_file):
    text = text_file(100, "held_out.md")
    ids = plain(tokenizer, text)
    data = make(validation=text, test=text, validation_tokens=50)
    expected = [ids[i : i + 16] for i in (0, 16, 32)]
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert rows(loader) == expected
        assert loader.batch_size == 1
    assert data.protocol() == {
        "text": "held_out.md",
        "split": "whole text",
        "window": 16,
        "tokens": 48,
        "train": "text.txt",
    }
    whole = make(validation=text, validation_tokens=None)
    assert whole.protocol()["tokens"] == len(ids) // 16 * 16
    assert make(validation=text).protocol()["tokens"] == len(ids) // 16 * 16  # fewer than 65536


def test_with_a_validation_source_training_has_the_rest(make, tokenizer, text_file):
    data = make(validation=text_file(100, "v.txt"))
    total = len(plain(tokenizer, text_file()))
    assert len(data.train_dataloader()) == (total - round(total * 0.25)) // 8 // 2


def test_processes_get_as_many_windows_each(make, text_file):
    data = make(test=text_file(100, "t.txt"), validation_tokens=48)
    data.trainer = cast(Any, SimpleNamespace(lightning_module=None, global_rank=1, world_size=2))
    windows = rows(data.predict_dataloader())
    assert len(windows) == 3
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batches = list(loader)
        assert [bool((b["labels"] != -100).any()) for b in batches] == [True, True, True, False]
        assert data.protocol()["tokens"] == 48
    assert rows(data.val_dataloader())[:3] == windows


def test_hub_texts_take_the_split_of_their_role(make, monkeypatch):
    def load_dataset(name, config, split):
        return datasets.Dataset.from_dict({"text": [f"{split} {i}" for i in range(60)]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = make("org/name", validation="org/name", test="org/name:config:extra")
    assert data.tokenizer.decode(data.train_dataloader().dataset[0]["input_ids"])[:5] == "train"
    assert data.protocol()["split"] == "validation"
    protocol = data.protocol("test")
    assert (protocol["text"], protocol["split"]) == ("org/name:config", "extra")


def test_another_tokenizer_means_other_tokens(make, make_tokenizer):
    data = make()
    before = len(data.train_dataloader())
    other = make_tokenizer()
    other.add_tokens([f"w{i}" for i in range(400)])
    data.tokenizer = other
    assert len(data.train_dataloader()) < before


def test_the_protocol_names_the_held_out_share(make):
    protocol = make().protocol()
    assert protocol["split"] == "last 20 % of the training text"
    assert protocol["text"] == protocol["train"] == "text.txt"
    assert all(type(value) in (str, int) for value in protocol.values())


def test_instructions_are_padded_rows_split_by_example(make, instruction_file):
    data = make(instruction_file(30), length=400, window=400)
    batches = data.calibration_batches(4, 400, 4)
    assert len(batches) == 1
    lengths = batches[0]["attention_mask"].sum(1)
    assert batches[0]["input_ids"].shape == (4, int(lengths.max()))
    for row in range(4):
        labels = batches[0]["labels"][row]
        assert (labels[lengths[row] :] == -100).all()
        assert labels[0] == -100
        learnt = labels[labels != -100]
        assert data.tokenizer.decode(learnt).startswith("it is ")
    train = [tuple(t) for b in data.train_dataloader() for t in strip(b)]
    held_out = [tuple(t) for b in data.val_dataloader() for t in strip(b)]
    calibration = [tuple(t) for b in data.calibration_batches(6, 400, 4) for t in strip(b)]
    assert (len(train), len(held_out), len(calibration)) == (18, 6, 6)
    assert len({*train, *held_out, *calibration}) == 30
    assert data.protocol()["tokens"] == sum(map(len, held_out))


def strip(batch):
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        yield ids[mask.bool()].tolist()


def test_padding_uses_what_the_tokenizer_has(make_tokenizer, instruction_file):
    for options, expected in [({}, 1), ({"pad_token": None}, 0)]:
        data = TextDataModule(instruction_file(), **SMALL)
        data.tokenizer = make_tokenizer(**options)
        assert data._collate().fill["input_ids"] == expected
    data.tokenizer = make_tokenizer(pad_token=None, eos_token=None)
    assert data._collate().fill["input_ids"] == 0


def test_texts_are_tokenised_once(make, monkeypatch, text_file):
    calls = []
    tokenize = module.tokenize
    monkeypatch.setattr(
        module, "tokenize", lambda *args, **kwargs: calls.append(1) or tokenize(*args, **kwargs)
    )
    data = make(validation=text_file(90, "v.txt"))
    data.check("fit")
    data.calibration_batches(2, 8, 2)
    data.train_dataloader()
    data.val_dataloader()
    data.protocol()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 1}, "expected length of at least 2, got 1"),
        ({"window": 0}, "expected window"),
        ({"batch_size": 0}, "expected batch_size of at least 1"),
        ({"num_workers": -1}, "expected num_workers"),
        ({"seed": -1}, "expected seed of at least 0"),
        ({"seed": 2**32}, "expected seed below 4294967296, got 4294967296"),
        ({"validation_tokens": 15}, "expected validation_tokens of at least 16, got 15"),
        ({"calibration_share": 1.0}, "expected calibration_share"),
        ({"validation_share": 0.0}, "or give a validation text"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        TextDataModule("pydoc", **(SMALL | options))


def test_what_is_too_short_is_refused_with_the_numbers(make, text_file):
    short = text_file(3, "short.txt")
    with pytest.raises(UserError, match=r"4 windows of 8 tokens in the training part of short.txt"):
        make(short, batch_size=4, validation=text_file()).check("fit")
    with pytest.raises(UserError, match="1 windows of 16 tokens in the validation part of short"):
        make(validation=short).check("fit")
    with pytest.raises(UserError, match=r"in the test part of short\.txt"):
        make(test=short).check("test")
    with pytest.raises(UserError, match=r"500 windows of 8 .* got \d+ tokens, \d+ windows; .*0.25"):
        make().calibration_batches(500, 8, 4)
    with pytest.raises(UserError, match="expected a test text, got none"):
        make().test_dataloader()


def test_without_a_tokenizer_it_says_so(text_file):
    with pytest.raises(UserError, match="expected a tokenizer"):
        TextDataModule(text_file(), **SMALL).train_dataloader()


def test_the_tokenizer_by_hand_wins_over_argument_over_model(tokenizer, make_tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    models_own = make_tokenizer()
    data = TextDataModule("pydoc", tokenizer=str(tmp_path / "t"))
    data.trainer = cast(
        Any, SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=models_own))
    )
    assert data.tokenizer is not models_own
    data.tokenizer = tokenizer
    assert data.tokenizer is tokenizer
    data = TextDataModule("pydoc")
    data.trainer = cast(
        Any, SimpleNamespace(lightning_module=SimpleNamespace(tokenizer=models_own))
    )
    assert data.tokenizer is models_own


def test_yaml_arguments_parse(text_file):
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    found = parser.parse_args([f"--data.train={text_file()}", "--data.validation_tokens=null"])
    assert found.data.validation_tokens is None
    assert found.data.length == 512
    assert isinstance(parser.instantiate(found).data, TextDataModule)


class _Model(LightningModule):
    vocab_size = 300

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.layer = torch.nn.Linear(1, 1)
        self.seen = {"train": [], "validation": [], "test": [], "predict": []}

    def step(self, stage, batch):
        self.seen[stage] += batch["input_ids"].tolist()
        return self.layer(batch["input_ids"].float().mean()[None]).sum()

    def training_step(self, batch):
        return self.step("train", batch)

    def validation_step(self, batch):
        self.step("validation", batch)

    def test_step(self, batch):
        self.step("test", batch)

    def predict_step(self, batch):
        self.step("predict", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)


def make_trainer(**options):
    settings: dict[str, Any] = {"max_epochs": 1, "num_sanity_val_steps": 0} | options
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def test_every_stage_of_a_trainer_sees_its_text(tokenizer, text_file):
    data = TextDataModule(text_file(), test=text_file(120, "test.txt"), **SMALL)
    model, trainer = _Model(tokenizer), make_trainer()
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    trainer.predict(model, datamodule=data, return_predictions=False)
    assert sorted(model.seen["train"]) == sorted(rows(data.train_dataloader()))
    assert model.seen["validation"] == model.seen["predict"] == rows(data.val_dataloader())
    assert model.seen["test"] == rows(data.test_dataloader())


@pytest.mark.parametrize(
    ("train", "options", "says"),
    [
        ("no_such.txt", {}, "does not exist"),
        (None, {"validation": "no_such.txt"}, "does not exist"),
        (None, {"length": 4096, "window": 16}, "training part"),
    ],
)
def test_a_fit_fails_before_the_model_is_touched(tokenizer, text_file, train, options, says):
    model = _Model(tokenizer)
    model.configure_model = lambda: pytest.fail("reached the model")
    data = TextDataModule(train or text_file(), **(SMALL | options))
    with pytest.raises(UserError, match=says):
        make_trainer().fit(model, datamodule=data)


def test_only_what_a_stage_needs_must_exist(tokenizer, text_file):
    data = TextDataModule("no_such.txt", validation=text_file(), **SMALL)
    model = _Model(tokenizer)
    make_trainer().validate(model, datamodule=data, verbose=False)
    assert model.seen["validation"]
    assert data.protocol()["train"] == "no_such.txt"


def test_a_vocabulary_too_small_is_refused_in_the_fit(tokenizer, text_file):
    model = _Model(tokenizer)
    model.vocab_size = 50
    with pytest.raises(UserError, match="vocabulary of 50"):
        make_trainer().fit(model, datamodule=TextDataModule(text_file(), **SMALL))


@pytest.mark.parametrize("options", [{"max_steps": 0}, {"limit_train_batches": 0}])
def test_without_training_the_training_part_may_be_short(tokenizer, text_file, options):
    settings: dict[str, Any] = SMALL | {"batch_size": 500}
    data = TextDataModule(text_file(20), validation=text_file(90, "v.txt"), **settings)
    model = _Model(tokenizer)
    make_trainer(**options).fit(model, datamodule=data)
    assert model.seen["train"] == []


def test_the_same_text_twice_is_warned_of(make, text_file):
    with pytest.warns(UserWarning, match="are the same"):
        make(validation=text_file()).check("fit")
