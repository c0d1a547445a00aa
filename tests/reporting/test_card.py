"""The model card: header, numbers, no paths of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_prune import PrunableLM
from lit_prune.export.describe import card_of
from lit_prune.reporting.card import model_card, public_name
from lit_prune.reporting.report import build_report, load_lines, model_entry
from tests.structure.tiny import tiny_model

METHOD: dict[str, Any] = {
    "name": "FASP",
    "options": {"sparsity": 0.2, "granularity": "none", "data": "/data/me/texts/wiki.txt"},
    "widths": {
        "channel": {"dense": 1536, "kept": [1000, 1100, 1150]},
        "group": {"dense": 3, "kept": [2, 2, 2]},
        "hidden": {"dense": 576, "kept": 512},
    },
}


def make_report(models: tuple[str, ...] = ("dense", "pruned", "recovered"), **changes: Any) -> Any:
    entry = model_entry(
        perplexity=21.5, parameters=1_000_000, decoder_parameters=900_000, weight_bytes=2_000_000
    )
    values: dict[str, Any] = {
        "protocol": {"text": "/home/me/texts/wiki.txt", "window": 64, "tokens": 630},
        "sparsity": {"target": 0.2, "decoder": 0.1987, "total": 0.15},
        "models": dict.fromkeys(models, entry),
    }
    return build_report(**(values | changes))


def make_card(**changes: Any) -> str:
    values: dict[str, Any] = {
        "report": make_report(),
        "lineage": [],
        "base": "owner/name-1.5",
        "method": METHOD,
        "load_lines": load_lines("you/name-pruned"),
        "stock": True,
    }
    return model_card(**(values | changes))


def header(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_header_is_what_the_hub_reads():
    assert header(make_card(license="apache-2.0")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name-1.5",
        "license": "apache-2.0",
        "tags": ["pruned", "lit-prune"],
    }
    assert "license" not in header(make_card())


def test_header_is_accepted_by_huggingface_hub():
    from huggingface_hub import ModelCard

    card = ModelCard(make_card(license="mit"))
    data = card.data.to_dict()
    assert (data["base_model"], data["tags"]) == ("owner/name-1.5", ["pruned", "lit-prune"])


def test_card_says_what_was_done_and_measured():
    card = make_card()
    for words in (
        "- Method: FASP",
        "- Recovery: training without adapters\n",
        "removed 19.87% of the decoder's parameters (target 20.00%), 15.00% of all",
        "- channel: 1,000 to 1,150 of 1,536 in 3 layers (mean 1,083.3)",
        "- group: 2 of 3 in each of 3 layers",
        "- hidden: 512 of 576",
        "- Options: sparsity 0.2, granularity none, data wiki.txt",
        "| dense | 21.50 | 1.000 | 1,000,000 | 2.0 | - |",
        "| recovered | 21.50 |",
        "Protocol: perplexity on wiki.txt, 630 tokens, windows of 64.",
        "```python\n" + load_lines("you/name-pruned") + "\n```",
        "lit_prune ",
    ):
        assert words in card
    assert "Earlier prunings" not in card


def test_without_recovery_or_report_nothing_is_claimed():
    card = make_card(report=make_report(("dense", "pruned")))
    assert "| recovered | not run |" in card
    assert "LoRA" not in card
    card = make_card(report=None, method={"name": "FASP"})
    assert "Not measured." in card
    assert "Sparsity" not in card


@pytest.mark.parametrize("adapter", [None, {"rank": 8}])
def test_recovery_is_lora_where_there_were_adapters(adapter: Any):
    module = PrunableLM.from_model(tiny_model("llama"))
    module.adapter, module.report = adapter, make_report()
    card = card_of(module, "pruned")
    assert ("- Recovery: LoRA, merged into the weights\n" in card) == (adapter is not None)
    assert ("LoRA" in card) == (adapter is not None)


def test_loading_depends_on_the_class():
    assert "stock checkpoint" in make_card(stock=True)
    card = make_card(stock=False)
    assert "lit_prune.load_pruned" in card
    assert "stock checkpoint" not in card


def test_lineage_is_kept_in_order():
    lineage = [
        {"base": "owner/name", "method": "FASP", "sparsity": {"decoder": 0.2000001, "total": 0.1}},
        {"base": "/home/someone/runs/first/pruned", "method": "magnitude", "base_digest": "a"},
    ]
    card = make_card(lineage=lineage)
    assert "1. base owner/name, method FASP, sparsity (decoder 0.2, total 0.1)\n" in card
    assert "2. base pruned, method magnitude\n" in card
    assert header(make_card(lineage=lineage, base="/a/b"))["base_model"] == "owner/name"


@pytest.mark.parametrize("form", ["absolute", "relative", "home", "dotted", "gguf", "windows"])
def test_no_local_path_reaches_the_card(form: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my-model").mkdir(parents=True)
    base = {
        "absolute": f"{tmp_path}/models/my-model/",
        "relative": "models/my-model",
        "home": "~/models/my-model",
        "dotted": "../secret/my-model",
        "gguf": f"{tmp_path}/secret/my-model.gguf",
        "windows": r"C:\secret\my-model",
    }[form]
    secret = f"{tmp_path}/secret"
    card = make_card(
        base=base,
        load_lines=load_lines(f"{secret}/pruned"),
        lineage=[{"base": base, "note": f"from {secret}/a.yaml"}],
        method={"name": "FASP", "options": {"paths": [f"{secret}/b.txt"], "at": Path(secret)}},
        report=make_report(warnings=[f"text {secret}/wiki.txt is short"]),
    )
    assert "# my-model, pruned" in card
    assert "base_model" not in header(card)
    for word in (str(tmp_path), "secret/", "secret\\", "models/", "~"):
        assert word not in card
    assert 'from_pretrained("pruned")' in card


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("embedded:smollm2-135m-instruct", "embedded:smollm2-135m-instruct"),
        ("/a/b/c", "c"),
        ("/", "local model"),
        ("a/b/c/", "c"),
    ],
)
def test_public_names(source: str, name: str):
    assert public_name(source) == name


def test_card_has_one_line_per_option_even_for_odd_values():
    card = make_card(method={"name": "x", "options": {"a": "two\nlines", "b": None, "c": [1, 2.5]}})
    assert "- Options: a two lines, b None, c [1, 2.5]\n" in card
