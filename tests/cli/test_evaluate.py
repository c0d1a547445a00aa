"""`evaluate` and `compare`: what is measured once, kept, and put side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_prune import load_pruned
from lit_prune.cli.front import main
from lit_prune.data.sources import read_source
from lit_prune.evaluation.texts import text_perplexity
from lit_prune.pretrained import load_tokenizer
from tests.cli.conftest import Workspace


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(finished: Path, here: Path) -> Path:
    shutil.copytree(finished, here / "run")
    return here / "run"


def measure(workspace: Workspace, *args: str) -> int:
    texts = json.dumps([workspace.text])
    command = ["evaluate", *args, "--texts", texts, "--dtype", "float32", "--tokens", "64"]
    return main([*command, "--speed", "false"])


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
        return {name: {"protocol": {}, "batches": {}} for name in models}

    monkeypatch.setattr("lit_prune.cli.evaluate.generation_speed", generation_speed)
    monkeypatch.setattr("lit_prune.cli.evaluate.footprint", lambda source, **_: {"how": source})
    texts = json.dumps([workspace.text])
    assert main(["evaluate", "run", "--texts", texts, "--windows", "[16]"]) == 0
    assert taken == ["model", "dense"]
    found = record(run / "evaluation.json")
    assert found["dense"]["speed"]["memory"]["how"] == workspace.model
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


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing/here/now"], "got nothing there"),
        (["run", "--windows", "[1]"], "windows of at least 2 tokens"),
        (["run", "--dense", "./gone"], "got nothing there"),
        (["run", "--tasks", "[piqqa]"], "did you mean piqa"),
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
) -> None:
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
        ([], "expected --models, got nothing"),
    ):
        assert main(["compare", *args]) == 2
        assert words in refused(capsys)
