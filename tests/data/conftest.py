"""A tokenizer made in the process, and a cache of the test's own."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the quick brown fox jumps over the lazy dog. " * 3, "a dog, a fox\n\nand 123 numbers"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def backend_json():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


@pytest.fixture
def make_tokenizer(backend_json):
    """Returns a function that makes a byte-level BPE tokenizer of 300 tokens."""

    def make(**options):
        options = {"eos_token": "<eos>", "pad_token": "<pad>", "model_max_length": 64} | options
        backend = Tokenizer.from_str(backend_json)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def text_file(tmp_path):
    """Returns a function that writes a text of numbered words."""

    def write(words=400, name="text.txt"):
        path = tmp_path / name
        path.write_text(" ".join(f"w{i}" for i in range(words)), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def instruction_file(tmp_path):
    def write(rows=12, name="instructions.json"):
        records = [
            {"instruction": f"say {i}", "input": "in" * (i % 3), "output": f"it is {i}" + "!" * i}
            for i in range(rows)
        ]
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return str(path)

    return write
