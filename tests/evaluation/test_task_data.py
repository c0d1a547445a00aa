"""Local files as data of tasks: names, splits, raw and preprocessed fields, mistakes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from lit_prune.errors import UserError
from lit_prune.evaluation.task_data import find_files, first_failing, read_records
from lit_prune.evaluation.tasks import evaluate_tasks
from tests.evaluation.small_tasks import (
    SUBJECT,
    make_tokenizer,
    preprocessed,
    records,
    subjects,
    write,
)
from tests.structure.tiny import tiny_model

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama").double()


def evaluate(model: Any, name: str, folder: Path, **options: Any) -> dict[str, Any]:
    found = evaluate_tasks(model, make_tokenizer(), name, data=folder, progress=False, **options)
    return found["tasks"][name]


def refused(model: Any, name: str, folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(model, name, folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names -------------------------------------------------------------------------------------

_THREE = {"training_split": "train", "validation_split": "validation", "test_split": "test"}


@pytest.mark.parametrize(
    ("definition", "fewshot", "names", "expected"),
    [
        (_THREE, 0, ["t.jsonl"], {"test": "t.jsonl"}),
        (_THREE, 0, ["t-100.jsonl"], {"test": "t-100.jsonl"}),
        (_THREE, 0, ["t.test.jsonl", "t_validation.jsonl"], {"test": "t.test.jsonl"}),
        (_THREE, 0, ["t-test.jsonl", "tt.jsonl"], {"test": "t-test.jsonl"}),
        (_THREE, 2, ["t.jsonl", "t_train.jsonl"], {"test": "t.jsonl", "train": "t_train.jsonl"}),
        ({**_THREE, "test_split": None}, 0, ["t.jsonl"], {"validation": "t.jsonl"}),
        (
            {**_THREE, "fewshot_split": "dev"},
            5,
            ["t.jsonl", "t.dev.jsonl"],
            {"test": "t.jsonl", "dev": "t.dev.jsonl"},
        ),
        (
            {**_THREE, "fewshot_config": {"split": "validation"}},
            5,
            ["t.jsonl", "t-validation.jsonl"],
            {"test": "t.jsonl", "validation": "t-validation.jsonl"},
        ),
        ({"test_split": "test", "fewshot_split": "test"}, 5, ["t.jsonl"], {"test": "t.jsonl"}),
        ({**_THREE, "fewshot_config": {"samples": []}}, 5, ["t.jsonl"], {"test": "t.jsonl"}),
    ],
)
def test_files_of_splits(
    tmp_path: Path, definition: Any, fewshot: int, names: list[str], expected: dict[str, str]
) -> None:
    for name in names:
        (tmp_path / name).touch()
    found = find_files(tmp_path, "t", definition, fewshot)
    assert not isinstance(found, str)
    assert {split: path.name for split, path in found.paths.items()} == expected
    assert found.scored.name == names[0]


@pytest.mark.parametrize(
    ("definition", "fewshot", "reason"),
    [
        (_THREE, 0, "no data: t.jsonl is not in files"),
        (_THREE, 3, "no data: t.jsonl is not in files"),
        ({**_THREE, "class": 1}, 0, "lm-eval makes its data in Python"),
        ({"training_split": "train"}, 0, "neither a test nor a validation split"),
    ],
)
def test_no_files(tmp_path: Path, definition: Any, fewshot: int, reason: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "t_validation.jsonl").touch()
    (folder / "tt.jsonl").touch()
    assert reason in str(find_files(folder, "t", definition, fewshot))


def test_no_examples(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").touch()
    found = find_files(tmp_path, "t", _THREE, 3)
    assert found == f"no data: t_train.jsonl is not in {tmp_path.name}, for 3-shot"


def test_two_files_for_one_split(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t-100.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"got t-100.jsonl and t.jsonl; keep one"):
        find_files(tmp_path, "t", _THREE, 0)


# --- raw and preprocessed ----------------------------------------------------------------------


def test_raw_and_preprocessed_files_agree(model: Any, tmp_path: Path) -> None:
    raw = records("hellaswag", 20)
    path = write(tmp_path / "raw", "hellaswag", raw)
    write(tmp_path / "done", "hellaswag-20", [preprocessed(record) for record in raw])
    write(tmp_path / "both", "hellaswag", [{**record, **preprocessed(record)} for record in raw])
    found = {
        part: evaluate(model, "hellaswag", tmp_path / part) for part in ("raw", "done", "both")
    }
    assert found["raw"]["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    digests = {entry.pop("digest") for entry in found.values()}
    assert len(digests) == 3
    assert found["raw"] == found["done"] == found["both"]
    assert found["raw"]["acc"] != found["raw"]["acc_norm"]
    plain = [{**record, "ctx_b": "w1", "endings": ["w1"] * 4} for record in raw]
    write(tmp_path / "other", "hellaswag", plain)
    assert evaluate(model, "hellaswag", tmp_path / "other")["acc"] != found["raw"]["acc"]


def test_examples_are_preprocessed_like_the_items(model: Any, tmp_path: Path) -> None:
    raw, examples = records("hellaswag", 8), records("hellaswag", 5, seed=1)
    for folder, change in ((tmp_path / "raw", dict), (tmp_path / "done", preprocessed)):
        write(folder, "hellaswag", [change(record) for record in raw])
        write(folder, "hellaswag_train", [change(record) for record in examples])
    one, other = (
        evaluate(model, "hellaswag", tmp_path / name, fewshot=1) for name in ("raw", "done")
    )
    assert one == {**other, "digest": one["digest"]}
    write(tmp_path / "raw", "hellaswag_train", [preprocessed(record) for record in examples])
    said = refused(model, "hellaswag", tmp_path / "raw", fewshot=1)
    assert "expected the field 'ctx_a'" in said
    assert "record 1 of" in said
    assert "hellaswag_train.jsonl" in said


def test_dates_stay_text(model: Any, tmp_path: Path) -> None:
    found = []
    for goal in ("2012-01-01", "x-x-x", "x-x-x x:x:x"):  # none of these words is known
        write(tmp_path, "piqa", [{**record, "goal": goal} for record in records("piqa", 30)])
        found.append({**evaluate(model, "piqa", tmp_path), "digest": None})
    assert found[0] == found[1] != found[2]


# --- not run -----------------------------------------------------------------------------------


def test_too_few_examples(model: Any, tmp_path: Path) -> None:
    write(tmp_path, SUBJECT, subjects(3))
    assert evaluate(model, SUBJECT, tmp_path) == {
        "not_run": f"no data: {SUBJECT}_dev.jsonl is not in {tmp_path.name}, for 5-shot"
    }
    write(tmp_path, f"{SUBJECT}_dev", subjects(4, seed=1))
    found = evaluate(model, SUBJECT, tmp_path)
    assert found == {"not_run": "5-shot needs 5 examples or more, got 4"}
    write(tmp_path, f"{SUBJECT}_dev", subjects(5, seed=1))
    assert evaluate(model, SUBJECT, tmp_path)["fewshot"] == 5


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "expected records in .*piqa.jsonl, got an empty file"),
        ("\n\n", "got an empty file"),
        ('{"a": 1}\n{"a"\n', "expected JSON in line 2 of .*piqa.jsonl, got "),
        ('{"a": 1}\n\n[1]\n', "a JSON object in line 3 of .*piqa.jsonl, got a list"),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=what):
        read_records(path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="a jsonl file in UTF-8"):
        read_records(path)


_TASKS = {"piqa": "sol2", "arc_easy": "answerKey", "winogrande": "sentence", "hellaswag": "ctx_b"}


@pytest.mark.parametrize(("name", "field"), _TASKS.items())
@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("null", [True, False])
def test_a_missing_field(
    model: Any, tmp_path: Path, name: str, field: str, number: int, null: bool
) -> None:
    spoiled = records(name, 9)
    del spoiled[number - 1][field]
    if null:
        spoiled[number - 1][field] = None
    write(tmp_path, name, spoiled)
    said = refused(model, name, tmp_path)
    assert f"record {number} of {tmp_path / name}.jsonl" in said
    assert f"'{field}'" in said


def test_a_field_that_is_in_no_record(model: Any, tmp_path: Path) -> None:
    for name, field in (*_TASKS.items(), ("boolq", "label")):
        write(tmp_path, name, [{k: v for k, v in r.items() if k != field} for r in records(name)])
        said = refused(model, name, tmp_path)
        assert f"expected the field '{field}', which {name} needs, got " in said, said
        assert "in record 1 of" in said


def test_records_after_the_limit_do_not_count(model: Any, tmp_path: Path) -> None:
    spoiled = records("piqa")
    spoiled[8]["sol1"] = None
    write(tmp_path, "piqa", spoiled)
    assert evaluate(model, "piqa", tmp_path, limit=8)["items"] == 8
    assert "record 9 of" in refused(model, "piqa", tmp_path, limit=9)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("piqa", {"label": -1}, "record 4 of .*: its answer is -1, none of 2 choices"),
        ("piqa", {"label": 2}, "record 4 of .*: its answer is 2, none of 2 choices"),
        ("winogrande", {"answer": ""}, "a record that fits winogrande, got another in record 4"),
        ("winogrande", {"sentence": "w1 w2"}, "in record 4 of .*: substring not found"),
        ("arc_easy", {"answerKey": "E"}, "fits arc_easy, got another in record 4"),
        (
            "hellaswag",
            {"label": ""},
            "invalid literal for int.*; it has no 'split_type'",
        ),
        ("piqa", {"label": "one"}, "one kind in each field of .*, got another in record 4"),
    ],
)
def test_answers_that_are_none(
    model: Any, tmp_path: Path, name: str, change: dict[str, Any], what: str
) -> None:
    spoiled = records(name)
    spoiled[3].update(change)
    write(tmp_path, name, spoiled)
    with pytest.raises(UserError, match=what):
        evaluate(model, name, tmp_path)


def test_the_first_that_fails() -> None:
    for total in (1, 2, 9):
        for bad in range(1, total + 1):
            assert first_failing(total, lambda number, bad=bad: number >= bad) == bad
