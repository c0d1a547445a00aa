"""Perplexity of a text in windows, against a literal loop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.data.sources import Source
from lit_prune.errors import UserError
from lit_prune.evaluation import texts
from lit_prune.evaluation.texts import protocol, read_text, text_perplexity, windows
from lit_prune.notes import noting
from tests.evaluation.small import tiny_model

TEXT = "the cat sat on the mat and looked at the moon while dogs barked at nothing " * 3


class Letters:
    """A tokenizer of letters, one token each."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self._ids(each) for each in text]}
        return {"input_ids": self._ids(text)}

    def __len__(self) -> int:
        return 61

    def _ids(self, text: str) -> list[int]:
        return [ord(letter) % 61 for letter in text]


def literal_nll(model: Any, ids: Tensor, window: int, stride: int) -> list[float]:
    """Every token once, in the first window that holds it but does not start with it."""
    nats: list[float] = []
    seen = set()
    for begin in range(0, len(ids) - window + 1, stride):
        part = ids[begin : begin + window]
        log_p = model(input_ids=part[None]).logits[0].float().log_softmax(-1)
        for position in range(1, window):
            if begin + position not in seen:
                seen.add(begin + position)
                nats.append(-log_p[position - 1, part[position]].item())
    return nats


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (12, 1), (7, 7)])
def test_is_the_literal_loop(window: int, stride: int) -> None:
    model, tokenizer = tiny_model().eval(), Letters()
    ids = torch.tensor(tokenizer._ids(TEXT))[:100]
    if stride == window:  # a first token of a window is predicted by none
        windows_of = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
        with torch.no_grad():
            expected = [x for part in windows_of for x in literal_nll(model, part, window, window)]
    else:
        with torch.no_grad():
            expected = literal_nll(model, ids, window, stride)
    found = text_perplexity(
        model, tokenizer, Source("t", [TEXT]), window=window, stride=stride, tokens=100
    )
    assert found["predicted"] == len(expected)
    assert found["nll"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found["value"] == pytest.approx(math.exp(found["nll"]))
    held = {i for begin in range(0, 100 - window + 1, stride) for i in range(begin, begin + window)}
    assert found["tokens"] == len(held)


def test_batches_of_short_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, source = tiny_model().eval(), Source("t", [TEXT])
    one = text_perplexity(model, Letters(), source, window=8, stride=3)
    monkeypatch.setattr(texts, "_BATCH_TOKENS", 1)
    assert text_perplexity(model, Letters(), source, window=8, stride=3) == pytest.approx(one)
    assert [len(each["input_ids"]) for each in windows(torch.arange(40), 8, 8)] == [1] * 5


def test_says_how_it_was_measured() -> None:
    source = Source("t", [TEXT], split="test")
    found = text_perplexity(tiny_model().eval(), Letters(), source, window=16, tokens=40)
    told = {key: found[key] for key in ("text", "split", "window", "stride", "tokens", "dtype")}
    assert told == {
        **{"text": "t", "split": "test", "window": 16, "stride": 16, "tokens": 32},
        "dtype": "float64",
    }
    assert (found["level"], found["bos"], len(found["digest"])) == ("token", False, 16)
    other = text_perplexity(tiny_model().eval(), Letters(), source, window=8, tokens=40)
    assert protocol(found) != protocol(other)
    assert protocol(found) == protocol({**other, "window": 16, "stride": 16, "tokens": 32})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 65}, "at most 64 tokens"),
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 8, "stride": 9}, "stride from 1 to the window"),
        ({"window": 8, "stride": 0}, "stride from 1 to the window"),
        ({"window": 8, "tokens": 7}, "at least 8 tokens, those of a window, got 7"),
        ({"window": 8, "text": TEXT[:7]}, "at least 8 tokens in t, got 7"),
    ],
)
def test_what_can_not_be_measured_is_one_line(options: dict[str, Any], words: str) -> None:
    source = Source("t", [options.get("text", TEXT)])
    options = {key: value for key, value in options.items() if key != "text"}
    with pytest.raises(UserError, match=words):
        text_perplexity(tiny_model().eval(), Letters(), source, **options)


@pytest.mark.parametrize(("scale", "nll"), [(1e5, True), (math.nan, False)])
def test_what_is_not_finite_is_none_with_a_note(scale: float, nll: bool) -> None:
    model = tiny_model().eval()
    model.lm_head.weight.data.mul_(scale)
    with noting() as notes, pytest.warns(UserWarning, match="t: "):
        found = text_perplexity(model, Letters(), Source("t", [TEXT]), window=8)
    assert found["value"] is None
    assert (found["nll"] is not None) == nll
    assert found["predicted"] == found["tokens"] // 8 * 7
    assert json.dumps(found, allow_nan=False)
    (text,) = notes
    assert text.startswith("t: ")


def test_named_texts_are_joined_as_papers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, config: str | None, **options: Any) -> dict[str, list[str]]:
        asked.append((path, config, options["split"], options.get("data_files")))
        return {"text": ["a", "", "b"], "sentence": ["x", "y"]}

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_text("wikitext2").documents == ["a\n\n\n\nb"]
    assert read_text("ptb").documents == ["x y"]
    assert read_text("ptb-validation").documents == ["x\n\ny"]
    assert read_text("c4").documents == ["a  b"]
    assert [split for _, _, split, _ in asked] == ["test", "test", "validation", "validation"]
    for name, config, split, files in asked[1:3]:  # the configuration went with the script
        assert (name, config) == ("ptb-text-only/ptb_text_only", None)
        assert files == {split: f"penn_treebank/{split}/*.parquet"}


def test_a_text_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(UserError, match=r"expected the text ptb .*offline; give a local file"):
        read_text("ptb")
    (tmp_path / "my.txt").write_text("some words")
    assert read_text(str(tmp_path / "my.txt")).documents == ["some words"]


def test_instructions_are_no_text() -> None:
    source = Source("t", examples=[SimpleNamespace()])  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="got instructions in t"):
        text_perplexity(tiny_model().eval(), Letters(), source, window=8)
