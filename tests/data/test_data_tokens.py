"""Tokens are those of the text as it is, made once and found again by content."""

import json
import logging
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import lit_prune.data.tokens as tokens_module
from lit_prune.data.cache import default_cache_dir
from lit_prune.data.instructions import alpaca_prompt, render
from lit_prune.data.sources import Example, Source
from lit_prune.data.tokens import (
    check_vocabulary,
    encode_documents,
    encode_texts,
    load_tokenizer,
    tokenize,
    tokenizer_digest,
)
from lit_prune.errors import UserError

TEXTS = ["the quick fox", " a dog\n\n", "123", "jumps over"]


@pytest.fixture
def calls(monkeypatch):
    """Lists the texts that are tokenised."""
    seen = []
    encode = tokens_module._encode

    def spy(tokenizer, text, **options):
        seen.append(text)
        return encode(tokenizer, text, **options)

    monkeypatch.setattr(tokens_module, "_encode", spy)
    return seen


def plain(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_one_document_is_its_text_without_special_tokens(tokenizer, caplog):
    text = "the quick brown fox. " * 50
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    assert tokenizer("a")["input_ids"][0] == 0
    with caplog.at_level(logging.WARNING):
        ids = encode_documents(tokenizer, [text])
    assert ids.tolist() == plain(tokenizer, text)
    assert len(ids) > tokenizer.model_max_length
    assert ids.dtype == torch.int32
    assert not caplog.records  # nothing about a text longer than the model takes


@pytest.mark.parametrize("eos", ["<eos>", None])
@pytest.mark.parametrize("batch", [1, 15, 10**6])
def test_documents_are_joined_as_a_loop_would(make_tokenizer, monkeypatch, eos, batch):
    monkeypatch.setattr(tokens_module, "BATCH_CHARACTERS", batch)
    tokenizer = make_tokenizer(eos_token=eos)
    separator = plain(tokenizer, "\n\n") if eos is None else [tokenizer.eos_token_id]
    expected = plain(tokenizer, TEXTS[0])
    for text in TEXTS[1:]:
        expected += separator + plain(tokenizer, text)
    assert encode_documents(tokenizer, TEXTS).tolist() == expected


def whitespace_tokenizer(prepend):
    vocab = {"<unk>": 0} | {chr(c): c for c in range(33, 127)} | {"▁": 200, "▁a": 201, "▁▁": 202}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "▁")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=prepend != "x")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def contextual_tokenizer():
    """A tokenizer whose pieces would not be those of the whole: it marks a text's beginning."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "x": 2, "fox": 3}, unk_token="<unk>"))
    backend.normalizer = normalizers.Prepend("x ")
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["a", " fox", " 12", "\n", "  ", "!\n", " a", "é", "the"]), min_size=80
    )
)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(backend_json, words):
    text = "".join(words)
    byte_level = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend_json))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PIECE_CHARACTERS", 90)
        patch.setattr(tokens_module, "OVERLAP_CHARACTERS", 40)
        patch.setattr(tokens_module, "STABLE_CHARACTERS", 10)
        metaspace = map(whitespace_tokenizer, ["always", "never", "first"])
        for tokenizer in (byte_level, contextual_tokenizer(), *metaspace):
            (ids,) = encode_texts(tokenizer, [text])
            assert ids.tolist() == plain(tokenizer, text)


def test_a_long_text_is_really_cut(tokenizer, monkeypatch, calls):
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(tokens_module, "OVERLAP_CHARACTERS", 60)
    monkeypatch.setattr(tokens_module, "STABLE_CHARACTERS", 10)
    text = "the quick brown fox " * 40
    assert encode_documents(tokenizer, [text, "dog"]).tolist() == [
        *plain(tokenizer, text),
        tokenizer.eos_token_id,
        *plain(tokenizer, "dog"),
    ]
    assert len(calls) > 4
    assert max(map(len, calls)) == 200


def test_tokens_come_from_the_cache(tokenizer, calls):
    source = Source("a", TEXTS)
    first = tokenize(source, tokenizer)
    made = len(calls)
    again = tokenize(Source("other name", list(TEXTS)), tokenizer)
    assert made > 0
    assert len(calls) == made
    assert torch.equal(first.ids, again.ids)
    assert first.ids.dtype == again.ids.dtype


def test_a_change_of_anything_tokenises_again(tokenizer, make_tokenizer, calls):
    grown = make_tokenizer()
    grown.add_tokens(["fox"])
    variants = [
        (Source("a", TEXTS), tokenizer, "text"),
        (Source("a", [*TEXTS, "x"]), tokenizer, "text"),
        (Source("a", TEXTS[::-1]), tokenizer, "text"),
        (Source("a", TEXTS), tokenizer, "body"),
        (Source("a", TEXTS), grown, "text"),
        (Source("a", TEXTS), make_tokenizer(eos_token="<pad>"), "text"),
        (Source("a", examples=[Example("a", "", "b")]), tokenizer, "text"),
        (Source("a", examples=[Example("a", "", "b")]), chatty(make_tokenizer()), "text"),
    ]
    for source, used, field in variants:
        before = len(calls)
        tokenize(source, used, field=field)
        assert len(calls) > before
    done = len(calls)
    for source, used, field in variants:
        tokenize(source, used, field=field)
    assert len(calls) == done


def test_a_call_with_padding_is_no_other_tokenizer(tokenizer):
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digest
    assert tokenizer_digest(cast(Any, object())) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_cache_is_made_again(tokenizer, calls, tmp_path, damage):
    source = Source("a", TEXTS)
    expected = tokenize(source, tokenizer, cache_dir=tmp_path / "c").ids
    (path,) = (tmp_path / "c").iterdir()
    data = path.read_bytes()
    damaged = {
        "cut": data[:-5],
        "flip": data[:-1] + bytes([data[-1] ^ 1]),
        "empty": b"",
        "other": b"not a safetensors file",
    }
    path.write_bytes(damaged[damage])
    made = len(calls)
    assert torch.equal(tokenize(source, tokenizer, cache_dir=tmp_path / "c").ids, expected)
    assert len(calls) > made
    assert path.read_bytes() == data
    assert [p.name for p in (tmp_path / "c").iterdir()] == [path.name]


def test_without_a_writable_cache_it_goes_on(tokenizer, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    ids = tokenize(Source("a", TEXTS), tokenizer, cache_dir=blocked / "cache").ids
    assert ids.tolist() == encode_documents(tokenizer, TEXTS).tolist()
    assert blocked.read_text() == "in the way"


def test_a_full_disk_leaves_nothing_behind(tokenizer, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_prune.data.cache.save_file", full)
    tokenize(Source("a", TEXTS), tokenizer, cache_dir=tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def test_the_cache_is_where_the_platform_keeps_it(monkeypatch, tmp_path):
    assert default_cache_dir() == tmp_path / "cache" / "lit-prune" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lit-prune" / "tokens"


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    ids = torch.tensor([3, 299, 5])
    check_vocabulary(tokenizer, ids, 300)
    check_vocabulary(tokenizer, ids, None)
    check_vocabulary(tokenizer, ids[:0], 1)
    with pytest.raises(UserError, match="vocabulary of 299, got 299 from a tokenizer of 300 "):
        check_vocabulary(tokenizer, ids, 299)


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# opens a generation with what a finished turn doesn't have
THINKING = CHAT.replace("[assistant]{%", "[assistant]<think>{%")


def chatty(tokenizer, template=CHAT):
    tokenizer.chat_template = template
    return tokenizer


EXAMPLE = Example("add up", "1 2", "<3>")


def test_alpaca_prompt_with_and_without_input():
    with_input, without = alpaca_prompt(EXAMPLE), alpaca_prompt(EXAMPLE._replace(input=""))
    assert with_input.endswith("### Instruction:\nadd up\n\n### Input:\n1 2\n\n### Response:\n")
    assert without.endswith("request.\n\n### Instruction:\nadd up\n\n### Response:\n")


def test_without_a_template_the_answer_ends_with_eos(tokenizer, make_tokenizer):
    assert render(tokenizer, EXAMPLE) == (alpaca_prompt(EXAMPLE), "<3>", tokenizer.eos_token_id)
    assert render(make_tokenizer(eos_token=None), EXAMPLE).end is None


@pytest.mark.parametrize("template", [CHAT, THINKING])
def test_the_chat_template_is_cut_where_the_answer_begins(tokenizer, template):
    rendered = render(chatty(tokenizer, template), EXAMPLE)
    assert rendered == ("[user]add up\n\n1 2<eos>\n[assistant]", "<3><eos>\n", None)


def test_a_template_that_fails_is_one_line(tokenizer):
    with pytest.raises(UserError, match="one question and one answer"):
        render(chatty(tokenizer, "{{ raise_exception('no\nusers') }}"), EXAMPLE)


@pytest.mark.parametrize("chat", [True, False])
def test_rows_are_prompt_and_answer_tokenised_apart(tokenizer, chat):
    if chat:
        chatty(tokenizer)
    examples = [EXAMPLE, Example("greet", "", "hello dog"), Example("be quiet", "", "")]
    tokens = tokenize(Source("a", examples=examples), tokenizer)
    assert tokens.units == 3
    assert tokens.offsets is not None
    assert tokens.prompts is not None
    for row, example in enumerate(examples):
        prompt, answer, end = render(tokenizer, example)
        expected = plain(tokenizer, prompt) + plain(tokenizer, answer)
        expected += [] if end is None else [end]
        start, stop = tokens.offsets[row : row + 2].tolist()
        assert tokens.ids[start:stop].tolist() == expected
        assert tokens.prompts[row] == len(plain(tokenizer, prompt))
    assert tokens.offsets[-1] == len(tokens.ids)


def test_a_saved_tokenizer_loads_and_a_missing_one_is_one_line(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "t")
    loaded = load_tokenizer(str(tmp_path / "t"))
    assert plain(loaded, "the fox") == plain(tokenizer, "the fox")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected a tokenizer at"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_tokenizers_own_code_is_neither_run_nor_asked_about(tokenizer, tmp_path, monkeypatch):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Mine",
        "auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]},
    }
    path.write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    with pytest.raises(UserError, match="expected a tokenizer at"):
        load_tokenizer(str(tmp_path))
    assert asked == []


def test_digest_is_of_the_backend(tokenizer, make_tokenizer):
    assert tokenizer_digest(tokenizer) == tokenizer_digest(make_tokenizer(model_max_length=7))
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    other["pre_tokenizer"]["add_prefix_space"] = True
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(other)))
    assert tokenizer_digest(changed) != tokenizer_digest(tokenizer)
