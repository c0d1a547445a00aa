"""Tasks leave everything as it was, and say what they could not run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from lit_prune.errors import UserError
from lit_prune.evaluation import tasks
from lit_prune.evaluation.tasks import PAPERS, averages, evaluate_tasks, merged, task_names
from tests.evaluation.small_tasks import (
    evaluate,
    make_tokenizer,
    records,
    write,
)
from tests.structure.tiny import tiny_model

pytest.importorskip("lm_eval")


def test_nothing_is_left_behind(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = make_tokenizer(pad_token=None)
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    weights = list(model.parameters())
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    random.gauss(0, 1)
    before = _states()
    capfd.readouterr()
    names = ["hellaswag", "piqa"]
    evaluate_tasks(model, tokenizer, names, data=folder, progress=False)
    assert capfd.readouterr() == ("", "")
    assert _states() == before
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert all(one is two for one, two in zip(weights, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config.use_cache
    assert tokenizer.pad_token is None
    assert list(tmp_path.iterdir()) == []
    assert len(list(folder.iterdir())) == 7
    model.eval()
    model.lm_head.weight.requires_grad_(True)


def test_dropout_is_off(folder: Path) -> None:
    noisy: Any = tiny_model("llama", attention_dropout=0.9)
    expected = evaluate(noisy, "piqa", folder)
    assert evaluate(noisy.train(), "piqa", folder) == expected
    assert noisy.training


def _states() -> tuple[Any, ...]:
    array: Any = np.random.get_state()
    return random.getstate(), array[1].tolist(), torch.get_rng_state().tolist()


def test_progress_says_what_is_done(model: Any, folder: Path, capfd: Any) -> None:
    tokenizer = make_tokenizer()
    evaluate_tasks(model, tokenizer, "piqa", data=folder, limit=2, progress="of the dense model")
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "piqa of the dense model …"
    assert lines[1].startswith("piqa of the dense model: ")
    assert len(lines) == 2


def test_the_same_again_in_another_order(model: Any, folder: Path, found: dict[str, Any]) -> None:
    torch.manual_seed(77)
    again = evaluate(model, [*reversed(PAPERS)], folder)
    assert again["tasks"] == found["tasks"]
    assert again == json.loads(json.dumps(again))
    parts = [evaluate(model, name, folder) for name in PAPERS]
    assert merged(parts) == found


def test_a_limit_is_the_first_items(model: Any, folder: Path, tmp_path: Path) -> None:
    write(tmp_path, "piqa", records("piqa")[:5])
    few = evaluate(model, "piqa", folder, limit=5)
    all_of_them = evaluate(model, "piqa", tmp_path)
    assert few["tasks"]["piqa"]["items"] == 5
    assert few["protocol"]["limit"] == 5
    entry = {**few["tasks"]["piqa"], "digest": None}
    assert entry == {**all_of_them["tasks"]["piqa"], "digest": None}


# --- averages ----------------------------------------------------------------------------------


def test_averages_of_the_papers(found: dict[str, Any]) -> None:
    entries, means = found["tasks"], found["averages"]
    normed = ("hellaswag", "arc_challenge", "openbookqa")
    parts = [entries[name]["acc_norm" if name in normed else "acc"] for name in PAPERS]
    assert means["papers"]["value"] == pytest.approx(sum(parts) / 7)
    assert means["papers"]["metrics"]["piqa"] == "acc"
    parts = [entry.get("acc_norm", entry["acc"]) for entry in entries.values()]
    assert means["fasp"]["value"] == pytest.approx(sum(parts) / 7)
    parts = [entries[name]["acc"] for name in PAPERS]
    assert means["acc"] == {"value": pytest.approx(sum(parts) / 7), "tasks": [*PAPERS]}
    assert means["tva_prune"]["value"] == pytest.approx(sum(parts[:6]) / 6)
    assert means["tva_prune"]["tasks"] == [*PAPERS[:6]]
    assert found["protocol"]["dtype"] == "float64"
    assert found["protocol"]["harness"].startswith("lm-eval 0.")


def test_averages_over_what_is_missing() -> None:
    entries = {"piqa": {"acc": 0.5, "acc_norm": 0.6}, "boolq": {"not_run": "no data"}}
    means = averages(entries)
    assert means["acc"] == {"value": 0.5, "tasks": ["piqa"]}
    assert means["papers"]["not_run"].startswith("boolq, hellaswag, winogrande")
    assert averages({})["acc"] == {"not_run": "no task with acc was run"}


# --- what a user can do wrong ------------------------------------------------------------------


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks._loading(), "manager_for", _few_names)
    with pytest.raises(UserError, match="got 'pica': did you mean piqa"):
        task_names(["boolq", "pica"])
    with pytest.raises(UserError, match="at least one task"):
        task_names([])
    assert task_names(["papers", "piqa"]) == [*PAPERS]


def _few_names(names: tuple[str, ...]) -> Any:
    from lit_prune.evaluation import task_loading

    return task_loading._manager(tuple(_folders()))


def _folders() -> list[str]:
    import lm_eval.tasks

    from lit_prune.evaluation import task_loading

    root = Path(next(iter(lm_eval.tasks.__path__)))
    return [str(root / part) for part in dict.fromkeys(task_loading._FOLDERS.values())]


def test_options(model: Any, folder: Path) -> None:
    for options, what in (
        ({"limit": 0}, "limit of at least 1, got 0"),
        ({"fewshot": -1}, "fewshot of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=what):
            evaluate(model, "piqa", folder, **options)
    with pytest.raises(UserError, match="a folder with jsonl files of tasks, got "):
        evaluate(model, "piqa", folder / "none")
    with pytest.raises(UserError, match="a tokenizer of transformers for tasks, got NoneType"):
        evaluate_tasks(model, None, "piqa", data=folder)


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import lit_prune.evaluation

    monkeypatch.delattr(lit_prune.evaluation, "task_loading", raising=False)
    monkeypatch.delitem(sys.modules, "lit_prune.evaluation.task_loading", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"expected the package lm-eval .*pip install 'lit-prune\["):
        task_names("piqa")


def test_no_connection_is_a_reason(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    found = evaluate_tasks(model, make_tokenizer(), "piqa", progress=False)
    reason = "its data can't be had: Couldn't reach 'baber/piqa' on the Hub"
    assert found["tasks"] == {"piqa": {"not_run": reason}}
    assert found["protocol"]["data"] == "hub"


def test_hub_data_are_taken_as_they_are(
    model: Any, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: str, name: str | None = None, **kwargs: Any) -> Any:
        assert (path, name) == ("allenai/ai2_arc", "ARC-Easy")
        splits = ("train", "validation", "test")
        parts = {split: records("arc_easy", seed=int(split != "test")) for split in splits}
        return {split: datasets.Dataset.from_list(part) for split, part in parts.items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    entry = evaluate_tasks(model, make_tokenizer(), "arc_easy", progress=False)["tasks"]["arc_easy"]
    assert entry == {**found["tasks"]["arc_easy"], "digest": None}


def test_weights_that_are_not_finite(folder: Path) -> None:
    spoiled: Any = tiny_model("llama")
    spoiled.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="finite log-likelihoods, got NaN"):
        evaluate(spoiled, "piqa", folder)


def test_what_is_longer_than_the_context(folder: Path, tmp_path: Path) -> None:
    short: Any = tiny_model("llama", max_position_embeddings=12)
    entry = evaluate(short, "boolq", folder)["tasks"]["boolq"]
    assert 0 < entry["truncated"] <= 24
    write(tmp_path, "piqa", [{"goal": "w1", "sol1": "w1 " * 20, "sol2": "w2", "label": 0}])
    with pytest.raises(UserError, match="at most 12 tokens, the model's context, got one of 20"):
        evaluate(short, "piqa", tmp_path)
