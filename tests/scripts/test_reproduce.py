"""The tables as they are shown and run: no figure is made up, and a run goes on."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODEL = "embedded:smollm2-135m-instruct"
_MODULES = ("paper_tables", "paper_jobs", "paper_runs", "reproduce")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in _MODULES:
        sys.modules.pop(name, None)
    return {name: importlib.import_module(name) for name in _MODULES}


class Stub:
    """Stands for `lit-prune`: leaves the files that it would leave."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[list[str]] = []
        self.fails = fails

    def __call__(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.calls.append(list(arguments))
        if self.fails and self.fails in " ".join(arguments):
            return 2, "expected a calm sea, got a storm"
        given = dict(itertools.pairwise(arguments))
        if arguments[0] == "fit":
            folder = Path(given["--trainer.default_root_dir"])
            (folder / "pruned").mkdir(parents=True, exist_ok=True)
            (folder / "pruned/config.json").touch()
            plant_config(folder, given)
        else:
            evaluation(Path(given["--out"]), source=Path(arguments[1]).name)
        return 0, ""


def plant_config(folder: Path, given: dict[str, str]) -> None:
    """What a fit saves of its options."""
    saved = yaml.safe_load(Path(given["--config"]).read_text())
    saved["model"]["pretrained"] = given["--model.pretrained"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))


def evaluation(
    path: Path, source: str = MODEL, value: float | None = 31.25, **changed: Any
) -> None:
    """A record of `lit-prune evaluate` with one perplexity."""
    entry = {
        "value": value,
        "text": "wikitext2",
        "window": 2048,
        "stride": 2048,
        "tokens": 300_000,
        "tokenizer_tokens_total": 301_000,
    }
    model = {"source": source, "cost": {"parameters": 5.5e9}, "tasks": None, "speed": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**model, "perplexity": [entry | changed]}
    path.write_text(json.dumps({"model": found, "dense": None, "versions": {}, "warnings": []}))


def options(out: Path, *more: str) -> list[str]:
    """Arguments of the FASP table on the embedded model."""
    return ["--table", "fasp-2", "--model", MODEL, "--out", str(out), *more]


def cells(text: str, method: str, sparsity: str, who: str) -> list[list[str]]:
    """The lines of a markdown table that say so, in their cells."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [line for line in lines if line[:2] == [method, sparsity] and line[3].split()[0] == who]


def test_what_was_not_run_is_said(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["reproduce"].main(options(tmp_path, "--markdown")) == 0
    text = capsys.readouterr().out
    for sparsity in ("10%", "20%", "30%"):
        assert [line[2:] for line in cells(text, "FASP", sparsity, "ours")] == [
            ["smollm2-135m-instruct", "ours", "not run"]
        ]
    paper = cells(text, "FASP", "20%", "paper")
    assert [line[2:] for line in paper] == [
        ["OPT-125M", "paper", "30.55"],
        ["OPT-1.3B", "paper", "15.64"],
        ["OPT-2.7B", "paper", "14.19"],
    ]
    assert "SliceGPT" in text
    assert not cells(text, "SliceGPT", "20%", "ours")
    folder = tmp_path / "fasp-2/fasp-20-smollm2-135m-instruct"
    assert f"--sparsity 0.2 --no-recovery --trainer.default_root_dir {folder}\n" in text
    assert folder.with_name(f"{folder.name}.yaml").is_file()
    assert not folder.exists()


def test_the_papers_own_model_stands_beside_it(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(tmp_path / "fasp-2/dense-facebook-opt-125m/evaluation.json", "facebook/opt-125m")
    assert (
        scripts["reproduce"].main(["--table", "fasp-2", "--markdown", "--out", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    assert cells(text, "Dense", "0%", "ours")[0][2:] == ["OPT-125M", "ours", "31.25"]
    assert [line[4] for line in cells(text, "Dense", "0%", "ours")[1:]] == ["not run", "not run"]


def test_ours_and_how_it_differs(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "fasp-2/dense-smollm2-135m-instruct/evaluation.json"
    evaluation(place)
    assert scripts["reproduce"].main(options(tmp_path, "--markdown")) == 0
    text = capsys.readouterr().out
    assert cells(text, "Dense", "0%", "ours")[0][3:] == ["ours", "31.25"]
    evaluation(place, text="mine.txt", window=512, stride=512, tokens=4096)
    assert scripts["reproduce"].main(options(tmp_path, "--markdown")) == 0
    text = capsys.readouterr().out
    assert cells(text, "Dense", "0%", "ours")[0][3:] == ["ours [1]", "31.25"]
    assert (
        "[1] ours: text mine.txt, not wikitext2; windows of 512 tokens, not 2,048; the first "
        "4,096 of 301,000 tokens\n" in text
    )
    evaluation(place, source="another/model")
    assert scripts["reproduce"].main(options(tmp_path, "--markdown")) == 0
    text = capsys.readouterr().out
    assert cells(text, "Dense", "0%", "ours")[0][3:] == ["ours [1]", "not run"]
    assert "another model, another/model" in text


def test_what_was_measured_in_part_is_shown_in_part(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(tmp_path / "cce-1/dense-smollm2-135m-instruct/evaluation.json", window=128)
    arguments = ["--table", "cce-1", "--model", MODEL, "--out", str(tmp_path), "--markdown"]
    assert scripts["reproduce"].main(arguments) == 0
    (line,) = cells(capsys.readouterr().out, "Dense", "0%", "ours")
    assert line[4:] == ["31.25", *["not run"] * 9]


def test_a_perplexity_that_is_not_finite_was_run(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(tmp_path / "fasp-2/dense-smollm2-135m-instruct/evaluation.json", value=None)
    assert scripts["reproduce"].main(options(tmp_path, "--markdown")) == 0
    assert cells(capsys.readouterr().out, "Dense", "0%", "ours")[0][4] == "nan"


def test_run_skips_what_is_there_and_goes_on(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, main = Stub(), scripts["reproduce"].main
    stopped = tmp_path / "fasp-2/fasp-10-smollm2-135m-instruct"
    assert main(options(tmp_path), stub) == 0
    assert not stub.calls
    stopped.mkdir()
    plant_config(stopped, {"--config": f"{stopped}.yaml", "--model.pretrained": MODEL})
    evaluation(tmp_path / "fasp-2/dense-smollm2-135m-instruct/evaluation.json")
    assert main(options(tmp_path, "--run"), stub) == 0
    fits = [call for call in stub.calls if call[0] == "fit"]
    assert [Path(call[-1]).name if "last" not in call else "last" for call in fits] == [
        "last",
        "fasp-20-smollm2-135m-instruct",
        "fasp-30-smollm2-135m-instruct",
    ]
    assert fits[0][-2:] == ["--ckpt_path", "last"]
    assert str(stopped) in fits[0]
    assert len(stub.calls) == 6  # each was measured, the dense one was there
    capsys.readouterr()
    stub.calls.clear()
    (stopped / "evaluation.json").unlink()
    assert main(options(tmp_path, "--run"), stub) == 0
    assert [call[0] for call in stub.calls] == ["evaluate"]  # it was pruned already


def test_run_fills_what_was_not_measured(scripts: dict[str, Any], tmp_path: Path) -> None:
    stub, main = Stub(), scripts["reproduce"].main
    row = options(tmp_path, "--row", "dense", "--run")
    place = tmp_path / "fasp-2/dense-smollm2-135m-instruct/evaluation.json"
    wrongs: list[dict[str, Any]] = [
        {"window": 128, "stride": 128},
        {"text": "mine.txt"},
        {"tokens": 4096},
    ]
    for wrong in wrongs:
        evaluation(place, **wrong)
        stub.calls.clear()
        assert main(row, stub) == 0
        assert [call[0] for call in stub.calls] == ["evaluate"], wrong
    stub.calls.clear()
    assert main(row, stub) == 0  # now it is there
    evaluation(place, text="mine.txt", tokens=4096, value=None)  # measured: it has no value
    assert main([*row, "--text", "some/mine.txt", "--tokens", "5000"], stub) == 0
    assert not stub.calls
    assert main([*row, "--text", "some/mine.txt", "--tokens", "9000"], stub) == 0
    assert stub.calls


def test_run_fills_tasks_that_were_not_run(scripts: dict[str, Any], tmp_path: Path) -> None:
    stub, main = Stub(), scripts["reproduce"].main
    (tmp_path / "data").mkdir()
    out = ["--table", "fasp-4", "--model", MODEL, "--out", str(tmp_path), "--row", "dense"]
    row = [*out, "--run", "--task_data", str(tmp_path / "data")]
    table = scripts["paper_tables"].load("fasp-4")
    place = tmp_path / "fasp-4/dense-smollm2-135m-instruct/evaluation.json"

    def calls(data: str, limit: int | None = None, **changed: Any) -> int:
        done = {
            name: {"acc": 0.5, "acc_norm": 0.5} for name in scripts["paper_tables"].tasks(table)
        }
        evaluation(place)
        record = json.loads(place.read_text())
        record["model"]["tasks"] = {"protocol": {}, "tasks": done | changed}
        record["model"]["tasks"]["protocol"] |= {"data": data, "limit": limit}
        place.write_text(json.dumps(record))
        stub.calls.clear()
        assert main(row, stub) == 0
        return len(stub.calls)

    assert calls("data") == 0
    assert calls("other") == 1
    assert calls("data", limit=9) == 1
    assert calls("data", boolq={"not_run": "no data"}) == 1


def test_a_row_that_has_no_command_shows_the_papers_line(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = options(tmp_path, "--row", "slicegpt-10", "--markdown")
    assert scripts["reproduce"].main(arguments) == 0
    text = capsys.readouterr().out
    assert cells(text, "SliceGPT", "10%", "paper")[0][3:] == ["paper", "35.31"]
    assert "slicegpt-10: lit-prune can't run it" in text


def test_a_failing_row_is_shown_and_the_others_go_on(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub(fails="fasp-20")
    arguments = options(tmp_path, "--run", "--markdown", "--data", "mine.txt", "--samples", "8")
    assert scripts["reproduce"].main(arguments, stub) == 1
    text = capsys.readouterr().out
    failed, done = cells(text, "FASP", "20%", "ours")[0], cells(text, "FASP", "30%", "ours")[0]
    assert failed[4] == "not run"
    assert done[4] == "31.25"
    assert "ours: failed: expected a calm sea, got a storm\n" in text
    assert "calibrated on mine.txt; calibrated with 8 windows of 2048 tokens" in text


def test_a_run_with_other_options_is_not_shown(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, main = Stub(), scripts["reproduce"].main
    row = options(tmp_path, "--row", "fasp-20")
    assert main([*row, "--run"], stub) == 0
    config = tmp_path / "fasp-2/fasp-20-smollm2-135m-instruct/config.yaml"
    config.write_text(config.read_text().replace("sparsity: 0.2", "sparsity: 0.05"))
    stub.calls.clear()
    capsys.readouterr()
    assert main([*row, "--run", "--markdown"], stub) == 1
    text = capsys.readouterr().out
    assert not stub.calls
    assert cells(text, "FASP", "20%", "ours")[0][4] == "not run"
    assert "is a run with another sparsity: move it away" in text


def test_recovery_trains_on_the_row_before(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub, main = Stub(), scripts["reproduce"].main
    stub.fails = "--config " + str(tmp_path / "cce-1/cce-24-smollm2-135m-instruct.yaml")
    arguments = ["--table", "cce-1", "--model", MODEL, "--out", str(tmp_path), "--run"]
    assert main([*arguments, "--markdown"], stub) == 1
    fits = {Path(call[2]).stem: call for call in stub.calls if call[0] == "fit"}
    cut, tuned = (fits[f"cce-20{end}-smollm2-135m-instruct"] for end in ("", "-tuned"))
    assert cut[-1] + "/pruned" in tuned
    assert "--sparsity" not in tuned
    assert "--sparsity" in cut
    saved = yaml.safe_load(Path(tuned[2]).read_text())
    names = [each["class_path"].rpartition(".")[2] for each in saved["trainer"]["callbacks"]]
    assert names == ["RandomState", "LoRARecovery", "ExportCheckpoint"]
    assert "cce-24-tuned-smollm2-135m-instruct" not in fits
    assert "cce-24-smollm2-135m-instruct must be run first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--table", "fasp-9"], "cce-1, cce-2, "),
        ([], "expected --table with one of cce-1"),
        (["--table", "fasp-2", "--row", "fasp-21"], "fasp-20, "),
        (["--table", "fasp-2", "--rnu"], "--rnu"),
        (["--table", "fasp-2", "--tokens", "-1000"], "--tokens of at least 1, got -1000"),
        (["--table", "fasp-2", "--samples", "0"], "--samples of at least 1, got 0"),
        (["--table", "fasp-4", "--task_data", "no/such"], "a folder as --task_data, got no/such"),
    ],
)
def test_mistakes_are_one_line(
    scripts: dict[str, Any],
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert scripts["reproduce"].main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_a_text_that_the_hub_has_not_is_asked_for(
    scripts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = Stub()
    arguments = ["--table", "fusion-1", "--model", MODEL, "--out", str(tmp_path), "--run"]
    assert scripts["reproduce"].main(arguments, stub) == 1
    assert not [call for call in stub.calls if call[0] == "fit"]
    assert "expected --data with a text for fusion-20-cut, got none" in capsys.readouterr().out


def test_the_list_names_every_table_and_the_real_runner_says_why(
    scripts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert scripts["reproduce"].main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in scripts["paper_tables"].names())
    code, line = scripts["paper_runs"].run_process(["no-such-command"])
    assert code == 2
    assert line.startswith("expected a command")
