"""`evaluate` and `compare`: what is measured once, kept, and put side by side."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lit_prune import load_pruned
from lit_prune.cli.front import main
from lit_prune.data.sources import read_source
from lit_prune.errors import UserError
from lit_prune.evaluation import measuring
from lit_prune.evaluation.texts import text_perplexity
from lit_prune.loading.pretrained import load_tokenizer
from tests.cli.conftest import Workspace

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    shutil.copytree(finished, here / "run")
    return here / "run"


def measure(workspace: Workspace, *args: str) -> int:
    texts = json.dumps([workspace.text])
    command = ["evaluate", "--texts", texts, "--dtype", "float32", "--tokens", "64"]
    return main([*command, "--speed", "false", *args])


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("lit-prune: error: ")
    return line


def test_a_run_and_the_model_it_was_pruned_from(
    workspace: Workspace, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(workspace, "run", "--windows", "[16, 8]") == 0
    found = record(run / "evaluation.json")
    model = load_pruned(str(run / "pruned"))
    tokenizer, text = load_tokenizer(workspace.model), read_source(workspace.text)
    for each, window in zip(found["model"]["perplexity"], (16, 8), strict=True):
        expected = text_perplexity(model, tokenizer, text, window=window, tokens=64)
        assert {key: each[key] for key in expected} == expected
    dense, pruned = (found[role]["perplexity"][0]["value"] for role in ("dense", "model"))
    assert found["model"]["perplexity"][0]["ratio"] == pruned / dense != 1
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert found["model"]["cost"]["parameters"] == actual < found["dense"]["cost"]["parameters"]
    assert found["model"]["source"] == "run"
    out = capsys.readouterr().out
    assert f"{pruned:,.2f} ({pruned / dense:.3f} x)" in out
    assert "windows of 8" in out


def test_later_measurements_are_added(workspace: Workspace, run: Path) -> None:
    assert measure(workspace, "run/pruned", "--windows", "[16]") == 0
    first = record(run / "evaluation.json")
    assert measure(workspace, "run", "--windows", "[8]", "--dense", "none") == 0
    both = record(run / "evaluation.json")
    assert both["model"]["perplexity"][0] == first["model"]["perplexity"][0]
    assert [each["window"] for each in both["model"]["perplexity"]] == [16, 8]
    assert both["dense"] == first["dense"]
    assert both["model"]["perplexity"][1]["ratio"] is None  # dense has none of that window
    assert measure(workspace, "run", "--windows", "[8]") == 0
    again = record(run / "evaluation.json")
    assert len(again["model"]["perplexity"]) == 2
    assert again["model"]["perplexity"][1]["ratio"] > 0


def test_speed_of_models_that_take_turns(
    workspace: Workspace, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []

    def generation_speed(models: Any, **_: Any) -> Any:
        taken.extend(models)
        protocol = {"prompt": 4, "new_tokens": 2, "rounds": 5}
        return {name: {"protocol": protocol, "batches": {}} for name in models}

    monkeypatch.setattr("lit_prune.evaluation.measuring.generation_speed", generation_speed)
    monkeypatch.setattr(
        "lit_prune.evaluation.measuring.footprint", lambda source, **_: {"how": source}
    )
    texts = json.dumps([workspace.text])
    assert main(["evaluate", "run", "--texts", texts, "--windows", "[16]"]) == 0
    assert taken == ["model", "dense"]
    found = record(run / "evaluation.json")
    assert found["dense"]["speed"]["memory"]["how"] == workspace.model
    assert found["model"]["speed"]["dense"] == found["dense"]["digest"]
    assert found["model"]["speed"]["memory"]["how"].endswith("pruned")


def test_a_model_without_a_folder_of_its_own_is_written_where_asked(
    workspace: Workspace, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = here / "copy"
    shutil.copytree(workspace.model, copy)
    assert measure(workspace, "copy", "--windows", "[16]", "--out", "some/where.json") == 0
    assert not (copy / "evaluation.json").exists()
    found = record(here / "some/where.json")
    assert found["dense"] is None
    capsys.readouterr()
    assert main(["compare", "some/where.json", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"where.json": found}


def test_side_by_side(
    workspace: Workspace, run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(workspace, "run", "--windows", "[16]") == 0
    shutil.copytree(run, here / "other")
    (here / "other/evaluation.json").unlink()  # what its fit reported is left
    shutil.copytree(workspace.model, here / "plain")  # its cost is all that is known
    capsys.readouterr()
    assert main(["compare", "run", "other", "plain", "--format", "markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = table[0]
    assert names[2:3] == ["run"]
    assert names[4:] == ["other", "plain"]
    cells = {row[0]: dict(zip(names, row, strict=True)) for row in table[2:]}
    parameters = cells["size: parameters"]
    assert parameters["run"] == parameters["other"] != parameters["plain"]
    texts = [label for label in cells if label.startswith("perplexity")]
    assert len(texts) == 2  # other protocols, other rows
    assert {cells[texts[0]][name] for name in ("other", "plain")} == {"-"}
    report = json.loads((run / "report.json").read_text())["models"]
    value = report["recovered"]["perplexity"]
    ratio = value / report["dense"]["perplexity"]
    assert cells[texts[1]]["other"] == f"{value:,.2f} ({ratio:.3f} x)"


def rewrite(path: Path, **changes: Any) -> None:
    """Change the last step of an export's lineage."""
    content = json.loads(path.read_text())
    content["lineage"][-1] |= changes
    path.write_text(json.dumps(content))


def test_figures_that_are_not_finite(workspace: Workspace, run: Path) -> None:
    weights = run / "pruned/model.safetensors"
    tensors = load_file(weights)
    save_file({key: value * math.nan for key, value in tensors.items()}, weights, {"format": "pt"})
    assert measure(workspace, "run", "--windows", "[16]") == 0
    found = record(run / "evaluation.json")
    assert found["model"]["perplexity"][0]["value"] is None
    assert found["dense"]["perplexity"][0]["value"] > 1
    assert any("NaN" in text for text in found["warnings"])


def test_what_was_measured_is_kept_where_the_next_part_fails(
    workspace: Workspace, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate_tasks(*_: Any, **__: Any) -> None:
        raise UserError("expected a whole file, got a damaged one")

    monkeypatch.setattr("lit_prune.evaluation.tasks.evaluate_tasks", evaluate_tasks)
    monkeypatch.setattr("lit_prune.evaluation.tasks.task_names", list)
    assert measure(workspace, "run", "--windows", "[16]", "--tasks", "[piqa]") == 2
    assert record(run / "evaluation.json")["model"]["perplexity"][0]["value"] > 1


def test_a_dense_model_that_is_another_is_left_out(
    workspace: Workspace, run: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lineage = run / "pruned/lit_prune.json"
    step = json.loads(lineage.read_text())["lineage"][-1]
    assert (step["base"], step["base_local"]) == (workspace.model, True)
    assert measure(workspace, "run", "--windows", "[16]", "--dtype", "float16") == 0
    assert record(run / "evaluation.json")["dense"]["digest"] != step["base_digest"]
    (run / "evaluation.json").unlink()
    rewrite(lineage, base_digest="0" * 16)
    assert measure(workspace, "run", "--windows", "[16]") == 0
    found = record(run / "evaluation.json")
    assert found["dense"] is None
    assert "got other weights" in found["warnings"][-1]

    (run / "evaluation.json").unlink()
    asked: list[Any] = []

    def load_config(source: str, **access: Any) -> Any:
        asked.append((source, access["trust_remote_code"]))
        if source == "some/model":
            raise UserError("expected a model, got none")
        return load(source, **access)

    load = measuring.load_config
    monkeypatch.setattr(measuring, "load_config", load_config)
    for local in (True, False):  # a folder that is gone, and a model of the hub
        rewrite(lineage, base="some/model", base_local=local)
        args = ("run", "--windows", "[16]", "--trust_remote_code", "true")
        assert measure(workspace, *args) == 0
        words = "is not there" if local else "is left out"
        assert words in record(run / "evaluation.json")["warnings"][-1]
    assert asked[1:] == [(str(run / "pruned"), True), ("some/model", False)]


def test_figures_of_other_weights_are_not_shown(
    workspace: Workspace, run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(workspace, "run", "--windows", "[16]") == 0
    first = record(run / "evaluation.json")
    dtype = ("--dtype", "float16")  # the same weights
    assert measure(workspace, "run", "--windows", "[8]", "--dense", "none", *dtype) == 0
    both = record(run / "evaluation.json")
    assert [each["window"] for each in both["model"]["perplexity"]] == [16, 8]
    assert both["warnings"] == first["warnings"]
    weights = run / "pruned/model.safetensors"
    tensors = load_file(weights)
    save_file({key: value * 1.5 for key, value in tensors.items()}, weights, {"format": "pt"})
    capsys.readouterr()
    assert main(["compare", "run", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["run"]
    assert "windows of 16" not in str(found)
    assert found["model"]["digest"] is None
    assert "evaluate it again" in found["warnings"][0]
    assert measure(workspace, "run", "--windows", "[8]", "--dense", "none") == 0
    again = record(run / "evaluation.json")
    assert [each["window"] for each in again["model"]["perplexity"]] == [8]
    assert "are replaced" in again["warnings"][0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing/here/now"], "got nothing there"),
        (["run", "--windows", "[1]"], "windows of at least 2 tokens"),
        (["run", "--dense", "./gone"], "got nothing there"),
        (["run", "--tasks", "[piqqa]"], "did you mean piqa"),
        (["run", "--windows", "[2048]", "--tokens", "4096"], "the model's positions"),
        (["run", "--windows", "[]"], "expected --windows for the texts"),
        (["run", "--tokens=-1000"], "expected at least 1 of --tokens, got -1000"),
        (["run", "--limit", "3"], "expected --tasks with --limit"),
        (["run", "--task_data", "."], "expected --tasks with --task_data"),
        (["run", "--tasks", "[piqa]", "--limit", "0"], "expected limit of at least 1, got 0"),
        (["run", "--tasks", "[piqa]", "--fewshot=-1"], "expected fewshot of at least 0, got -1"),
        (["run", "--tasks", "[piqa]", "--task_data", "gone"], "got gone, which is none"),
        (["run", "--out", "run"], "got the folder run"),
        (["run", "--out", "/proc/x/y.json"], "expected a file that can be written"),
        (["run", "--device", "toaster"], "expected a device of this machine, got 'toaster'"),
        (["run", "--window", "[8]"], "did you mean --windows?"),
    ],
)
def test_mistakes_are_one_line(
    workspace: Workspace,
    run: Path,
    capfd: pytest.CaptureFixture[str],
    args: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_pretrained(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("lit_prune.evaluation.measuring.load_pretrained", load_pretrained)
    assert measure(workspace, *args) == 2
    assert words in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (run / "evaluation.json").exists()


def test_what_can_not_be_compared(here: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "empty").mkdir()
    (here / "bad.json").write_text("{}")
    for args, words in (
        (["gone"], "which is not there"),
        (["bad.json"], "expected a record of lit-prune evaluate"),
        (["empty"], "config.json"),
        (["run", "run"], "name each once"),
        ([], "expected MODELS, got nothing"),
    ):
        assert main(["compare", *args]) == 2
        assert words in refused(capsys)
