"""Tiny files of tasks in the raw fields of the hub's data sets, and a tokenizer for them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(45)]
SPECIAL = ["<pad>", "<s>", "</s>", "Question", "Answer", ":", "no", "yes", *"ABCD", ".", "?", "_"]
SUBJECT = "mmlu_abstract_algebra"


def make_tokenizer(**options: Any) -> Any:
    """A word tokenizer of 61 words, those of the templates among them."""
    words = [*SPECIAL, *WORDS, "are"]
    assert len(words) == 61
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


def write(folder: Path, name: str, records: Sequence[dict[str, Any]]) -> Path:
    """Write a jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """Write the seven tasks of the papers, HellaSwag's raw."""
    for name in MAKERS:
        write(folder, name, records(name))
    return folder


def records(name: str, number: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a task."""
    draw = random.Random(f"{name}{seed}")
    return [MAKERS[name](draw, index) for index in range(number)]


def preprocessed(record: dict[str, Any]) -> dict[str, Any]:
    """A HellaSwag record after lm-eval's preprocessing."""

    def clean(text: str) -> str:
        text = text.strip().replace(" [title]", ". ")
        while "[" in text:
            start = text.index("[")
            text = text[:start] + text[text.index("]", start) + 1 :]
        return text.replace("  ", " ")

    context = f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    return {
        "ind": record["ind"],
        "query": clean(f"{record['activity_label']}: {context}"),
        "choices": [clean(ending) for ending in record["endings"]],
        "gold": int(record["label"]),
    }


def _text(draw: random.Random, least: int = 2, most: int = 6) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def _piqa(draw: random.Random, index: int) -> dict[str, Any]:
    return {
        "goal": _text(draw),
        "sol1": _text(draw),
        "sol2": _text(draw),
        "label": draw.randrange(2),
    }


def _letters(draw: random.Random, question: str) -> dict[str, Any]:
    number = draw.randint(3, 4)
    return {
        "id": f"{draw.randrange(999)}",
        question: _text(draw),
        "choices": {"text": [_text(draw) for _ in range(number)], "label": list("ABCD"[:number])},
        "answerKey": draw.choice("ABC"),
    }


def _arc(draw: random.Random, index: int) -> dict[str, Any]:
    return _letters(draw, "question")


def _openbookqa(draw: random.Random, index: int) -> dict[str, Any]:
    return _letters(draw, "question_stem")


def _winogrande(draw: random.Random, index: int) -> dict[str, Any]:
    return {
        "sentence": f"{_text(draw)} _ {_text(draw)} .",
        "option1": draw.choice(WORDS),
        "option2": _text(draw, 1, 2),
        "answer": draw.choice("12"),
    }


def _boolq(draw: random.Random, index: int) -> dict[str, Any]:
    return {
        "question": _text(draw),
        "passage": _text(draw, 5, 12),
        "idx": index,
        "label": draw.randrange(2),
    }


def _hellaswag(draw: random.Random, index: int) -> dict[str, Any]:
    return {
        "ind": index,
        "activity_label": _text(draw, 1, 2),
        "ctx_a": f"{_text(draw)} [header] {_text(draw)} [title] {_text(draw)}",
        "ctx_b": _text(draw, 1, 3),
        "endings": [f"{_text(draw)} [step] {_text(draw)}" for _ in range(4)],
        "split_type": None if index % 2 else "indomain",
        "label": f"{draw.randrange(4)}",
    }


def _mmlu(draw: random.Random, index: int) -> dict[str, Any]:
    choices = draw.sample(WORDS, 4)
    return {"question": _text(draw), "choices": choices, "answer": draw.randrange(4)}


MAKERS: dict[str, Any] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
}


def subjects(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a subject of MMLU."""
    draw = random.Random(seed)
    return [_mmlu(draw, index) for index in range(number)]


def evaluate(model: Any, names: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Evaluate tasks on the data of a folder, quietly."""
    from lit_prune.evaluation.tasks import evaluate_tasks

    return evaluate_tasks(model, make_tokenizer(), names, data=folder, progress=False, **options)
