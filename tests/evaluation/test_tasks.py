"""Tasks through our path give what lm-eval gives by itself, and what a literal loop gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.small_tasks import (
    SUBJECT,
    WORDS,
    evaluate,
    make_tokenizer,
    preprocessed,
    records,
    subjects,
    write,
)

pytest.importorskip("lm_eval")


def test_rolling_texts_are_those_of_a_literal_loop(model: Any, tmp_path: Path) -> None:
    from lm_eval import tasks as lm_eval_tasks

    from lit_prune.evaluation import harness, task_loading

    pages = [" ".join(WORDS[:5] * number) for number in (1, 7, 200)]  # the last: several windows
    write(tmp_path, "wikitext", [{"page": page} for page in pages])
    manager = task_loading._manager((str(Path(next(iter(lm_eval_tasks.__path__))) / "wikitext"),))
    loaded: Any = task_loading.load_local(manager, "wikitext", tmp_path, None, None)
    tokenizer, most = make_tokenizer(), 256
    results, truncated = harness.run(
        model, tokenizer, loaded.tasks, loaded.groups, limit=None, batch_size=2, progress=None
    )
    total, ids = 0.0, []
    for page in pages:
        ids = tokenizer(page, add_special_tokens=False)["input_ids"]
        whole = [tokenizer.bos_token_id, *ids]
        for start in range(0, len(ids), most):
            end = min(start + most, len(ids))
            seen = torch.tensor([whole[max(0, end - most) : end]])
            logits = model(seen).logits[0, -(end - start) :].log_softmax(-1)
            total += sum(logits[n, token].item() for n, token in enumerate(ids[start:end]))
    words = sum(len(page.split()) for page in pages)
    assert len(ids) > most
    assert truncated == 0
    assert results["results"]["wikitext"]["word_perplexity,none"] == pytest.approx(
        np.exp(-total / words), rel=1e-6
    )


# --- lm-eval by itself -------------------------------------------------------------------------


def _gap(record: dict[str, Any]) -> list[str]:
    start = record["sentence"].split("_")[0]
    return [start + record["option1"], start + record["option2"]]


_LETTERS = {
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
}
_BOTH = [{"metric": "acc"}, {"metric": "acc_norm"}]
#: Written down again by hand.
BY_HAND: dict[str, dict[str, Any]] = {
    "boolq": {
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
        "metric_list": _BOTH[:1],
    },
    "piqa": {
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": _BOTH,
    },
    "hellaswag": {
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": _BOTH,
    },
    "winogrande": {
        "doc_to_text": lambda record: int(record["answer"]) - 1,
        "doc_to_target": lambda record: record["sentence"].split("_")[1].strip(),
        "doc_to_choice": _gap,
        "metric_list": _BOTH[:1],
    },
    "arc_easy": {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        **_LETTERS,
        "metric_list": _BOTH,
    },
    "openbookqa": {"doc_to_text": "question_stem", **_LETTERS, "metric_list": _BOTH},
}


def by_hand(model: Any, name: str, folder: Path, cache: Path, shots: int = 0) -> dict[str, Any]:
    """Scores of lm-eval's own functions on a task that is written by hand."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    files = {"validation": str(folder / f"{name}.jsonl")}
    if shots:
        files["train"] = str(folder / f"{name}_train.jsonl")
    task = {
        "task": f"{name}_by_hand",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(cache)},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        **({"training_split": "train", "num_fewshot": shots} if shots else {}),
        **BY_HAND[name],
    }
    adapter: Any = HFLM
    lm = adapter(pretrained=model, tokenizer=make_tokenizer(), batch_size=8)
    results: Any = evaluator.simple_evaluate(lm, tasks=[task], task_manager=_no_tasks())  # pyright: ignore
    scores = results["results"][f"{name}_by_hand"].items()
    return {key.removesuffix(",none"): value for key, value in scores if "," in key}


def _no_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", BY_HAND)
def test_scores_are_those_of_lm_eval(
    name: str, model: Any, folder: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    source = folder
    if name == "hellaswag":
        source = tmp_path
        write(source, name, [preprocessed(record) for record in records(name)])
    expected = by_hand(model, name, source, tmp_path / "cache")
    entry = found["tasks"][name]
    assert {key: entry[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert {key for key in entry if key.startswith("acc")} == expected.keys()
    assert (entry["items"], entry["fewshot"], entry["truncated"]) == (12, 0, 0)


@pytest.mark.usefixtures("_alone")
def test_fewshot_scores_are_those_of_lm_eval(model: Any, tmp_path: Path) -> None:
    write(tmp_path, "piqa", records("piqa", 30))
    write(tmp_path, "piqa_train", records("piqa", 9, seed=1))
    expected = by_hand(model, "piqa", tmp_path, tmp_path / "cache", shots=3)
    entry = evaluate(model, "piqa", tmp_path, fewshot=3)["tasks"]["piqa"]
    assert {key: entry[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert entry["fewshot"] == 3
    assert entry["acc"] != evaluate(model, "piqa", tmp_path)["tasks"]["piqa"]["acc"]


def test_scores_are_not_all_alike(found: dict[str, Any]) -> None:
    values = {
        entry[key]
        for entry in found["tasks"].values()
        for key in ("acc", "acc_norm")
        if key in entry
    }
    assert len(values) > 4
    assert not values & {0.0, 1.0}


# --- without lm-eval ---------------------------------------------------------------------------


def log_likelihood(model: Any, context: str, answer: str) -> float:
    """Of an answer's tokens after a context, token by token."""
    tokenizer, total = make_tokenizer(), 0.0
    seen = tokenizer(context)["input_ids"]
    for token in tokenizer(answer)["input_ids"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([seen])).logits[0, -1]
        total += float(torch.log_softmax(logits, 0)[token])
        seen = [*seen, token]
    return total


def score(model: Any, items: list[tuple[str, list[str], int]]) -> dict[str, float]:
    """acc and acc_norm of (context, answers, right one)."""
    right = {"acc": 0, "acc_norm": 0}
    for context, answers, gold in items:
        values = [log_likelihood(model, context, answer) for answer in answers]
        each = [value / len(answer) for value, answer in zip(values, answers, strict=True)]
        right["acc"] += values.index(max(values)) == gold
        right["acc_norm"] += each.index(max(each)) == gold
    return {name: count / len(items) for name, count in right.items()}


def test_arc_is_a_loop_over_log_likelihoods(model: Any, found: dict[str, Any]) -> None:
    items = []
    for record in records("arc_easy"):
        choices = record["choices"]
        gold = choices["label"].index(record["answerKey"])
        items.append((f"Question: {record['question']}\nAnswer:", choices["text"], gold))
    entry = found["tasks"]["arc_easy"]
    assert {name: entry[name] for name in ("acc", "acc_norm")} == score(model, items)


def test_mmlu_has_five_examples_in_order(model: Any, tmp_path: Path) -> None:
    scored, examples = subjects(15), subjects(7, seed=1)
    write(tmp_path, SUBJECT, scored)
    write(tmp_path, f"{SUBJECT}_dev", examples)

    def ask(record: dict[str, Any]) -> str:
        letters = zip("ABCD", record["choices"], strict=True)
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in letters)
        return f"{record['question']}\n{choices}Answer:"

    title = "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    shown = "".join(f"{ask(part)} {'ABCD'[part['answer']]}\n\n" for part in examples[:5])
    items = [(title + shown + ask(part), list("ABCD"), part["answer"]) for part in scored]
    entry = evaluate(model, SUBJECT, tmp_path)["tasks"][SUBJECT]
    assert entry["fewshot"] == 5
    assert entry["acc"] == score(model, items)["acc"]
    bare = [(title + ask(part), list("ABCD"), part["answer"]) for part in scored]
    entry = evaluate(model, SUBJECT, tmp_path, fewshot=0)["tasks"][SUBJECT]
    assert entry["acc"] == score(model, bare)["acc"]


def test_mmlu_is_the_mean_over_items(model: Any, tmp_path: Path) -> None:
    from lit_prune.evaluation import task_loading

    names = task_loading.members(task_loading.manager_for(("mmlu",)), "mmlu")
    assert len(names) == 57
    for number, name in enumerate(names):
        write(tmp_path, name, subjects(1 + number % 3, seed=number))
    found = evaluate(model, ["mmlu", *names], tmp_path, fewshot=0)["tasks"]
    whole = found.pop("mmlu")
    right = sum(entry["acc"] * entry["items"] for entry in found.values())
    assert (whole["items"], whole["fewshot"]) == (57 * 2, 0)
    assert whole["acc"] == pytest.approx(right / (57 * 2))
    for name in names[6:]:
        (tmp_path / f"{name}.jsonl").unlink()
    lost = evaluate(model, "mmlu", tmp_path, fewshot=0)["tasks"]["mmlu"]
    assert lost["not_run"].startswith(f"6 of its 57 tasks can be run; {names[6]}: no data")
