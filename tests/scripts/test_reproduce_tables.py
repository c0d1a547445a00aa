"""Tables of the papers: they are whole, their figures agree, and their commands parse."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from pydoc import locate
from typing import Any

import pytest

from lit_prune.evaluation.texts import NAMED

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODEL = "embedded:smollm2-135m-instruct"
_MODULES = ("paper_tables", "paper_jobs")
_COLUMNS = (
    {"title", "perplexity", "window"},
    {"title", "task", "metric"},
    {"title", "average"},
    {"title", "cost", "unit"},
    {"title", "paper_only"},
)
_SETUP = {
    "config",
    "options",
    "own",
    "data",
    "trainer",
    "model",
    "lora",
    "distillation",
    "prunes",
    "recovery",
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in _MODULES:
        sys.modules.pop(name, None)
    return {name: importlib.import_module(name) for name in _MODULES}


def test_the_tables_are_well_formed(scripts: dict[str, Any]) -> None:
    tables = scripts["paper_tables"]
    assert {"fasp-2", "vib-2", "cce-1", "fusion-1"} <= set(tables.names())
    for name in tables.names():
        found = json.loads((SCRIPTS / "tables" / f"{name}.json").read_text())
        assert found["table"] == name
        table = tables.load(name)
        assert table.paper
        assert table.caption
        assert ".txt" not in table.paper
        assert set(table.protocol) == {"calibration", "recovery", "evaluation", "axes", "notes"}
        assert all(set(column) in _COLUMNS for column in table.columns), name
        assert len({row.name for row in table.rows}) == len(table.rows)
        for setup in table.setups.values():
            assert set(setup) <= _SETUP, name
        assert {row.setup for row in table.rows} - {None, "dense"} == set(table.setups), name
        for row in table.rows:
            _check_row(table, row)


def _check_row(table: Any, row: Any) -> None:
    assert (row.sparsity == 0) == (row.setup == "dense")
    assert 0 <= row.sparsity < 1
    assert row.setup is not None or row.figures, row.name
    assert set(row.figures) <= set(table.models)
    for figures in row.figures.values():
        assert len(figures) == len(table.columns), (table.name, row.name)
        assert any(value is not None for value in figures)
    trains = row.setup in table.setups and not table.setups[row.setup].get("prunes", True)
    assert trains == (row.after is not None)
    if trains:
        names = [each.name for each in table.rows]
        assert names.index(row.after) < names.index(row.name)
        assert table.row(row.after).sparsity == row.sparsity


def test_every_text_is_known_and_ptb_is_that_of_the_papers_code(scripts: dict[str, Any]) -> None:
    # LLM-Pruner, whose windows of 128 tokens these are, reads PTB's validation split
    tables = scripts["paper_tables"]
    found = {
        (column["perplexity"], column["window"])
        for table in map(tables.load, tables.names())
        for column in table.columns
        if "perplexity" in column
    }
    assert {text for text, _ in found} <= set(NAMED)
    assert ("ptb-validation", 128) in found
    assert ("ptb", 128) not in found


def test_printed_averages_are_those_of_their_tasks(scripts: dict[str, Any]) -> None:
    # a digit that was read wrongly shows here
    tables = scripts["paper_tables"]
    checked = 0
    for table in map(tables.load, tables.names()):
        for row in table.rows:
            for figures in row.figures.values():
                pairs = list(zip(table.columns, figures, strict=True))
                single = [value for column, value in pairs if "task" in column]
                mean = next((v for column, v in pairs if column.get("average")), None)
                if mean is None or None in single:
                    continue
                checked += 1
                assert mean == pytest.approx(sum(single) / len(single), abs=0.03), row.name
    assert checked > 80


def every_fit(scripts: dict[str, Any], out: Path) -> list[Any]:
    """One row of each setup of each table, for the paper's models and for another one."""
    jobs, tables = scripts["paper_jobs"], scripts["paper_tables"]
    found: dict[str, Any] = {}
    for table in map(tables.load, tables.names()):
        for model in (None, MODEL):
            for job in jobs.jobs(table, jobs.Asked(out, model=model, data="sotu")):
                if job.row.setup != "dense":
                    found.setdefault(json.dumps([job.setup, job.row.sparsity, job.own]), job)
    return list(found.values())


def test_the_callbacks_of_every_row_take_their_options(
    scripts: dict[str, Any], tmp_path: Path
) -> None:
    fits = every_fit(scripts, tmp_path)
    assert len(fits) > 50
    for job in fits:
        for callback in scripts["paper_jobs"].configuration(job)["trainer"]["callbacks"]:
            owner: Any = locate(callback["class_path"])
            owner(**callback.get("init_args", {}))


def test_every_kind_of_command_parses(
    scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_prune.cli.main import PruneCLI, set_sparsity
    from lit_prune.data import TextDataModule
    from lit_prune.module import PrunableLM

    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "PL_GLOBAL_SEED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("instantiate_classes", "_run_subcommand"):
        monkeypatch.setattr(PruneCLI, name, lambda *_: None)
    jobs, kinds = scripts["paper_jobs"], {}
    for job in every_fit(scripts, tmp_path):  # the parser is slow: sections and flags once
        kinds.setdefault((job.setup["config"], *sorted(job.setup)), job)
    cli: Any = None
    for job in kinds.values():
        jobs.write(job)
        command = jobs.fit_command(job)
        if cli is None:
            cli = PruneCLI(PrunableLM, TextDataModule, command)
        config = cli.parser.parse_args(command)["fit"]
        if config.sparsity is not None:
            set_sparsity(config)
        assert config.model.pretrained == job.source
        assert config.trainer.default_root_dir == str(job.folder)
        pruner = jobs.pruner(config.as_dict())
        assert not pruner or pruner["init_args"]["sparsity"] == job.row.sparsity
    assert {job.setup["config"] for job in kinds.values()} >= {"cce", "fasp", "fusion", "vib"}


def test_evaluate_commands_parse(
    scripts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_prune.cli import evaluate
    from lit_prune.cli.functions import call_function

    class ParsedError(Exception):
        """The arguments have been understood."""

    def stop(model: str) -> None:
        raise ParsedError

    monkeypatch.setattr(evaluate.Place, "of", stop)
    jobs = scripts["paper_jobs"]
    for name in ("fasp-2", "cce-1", "minillm-mmlu", "cce-3"):
        table = scripts["paper_tables"].load(name)
        asked = jobs.Asked(tmp_path, MODEL, tokens=4096, task_data="d")
        command = jobs.evaluate_command(jobs.jobs(table, asked)[0])
        with pytest.raises(ParsedError):
            call_function(evaluate.evaluate_model, command[1:], "evaluate")
        if name == "cce-1":
            assert command[command.index("--texts") + 1] == '["wikitext2", "ptb-validation"]'
            assert command[command.index("--windows") + 1] == "[128]"
            assert len(json.loads(command[command.index("--tasks") + 1])) == 7


def test_tasks_and_their_average(scripts: dict[str, Any]) -> None:
    tables = scripts["paper_tables"]
    table = tables.load("fasp-4")
    found = {name: {"acc": 0.25, "acc_norm": 0.5, "items": 9} for name in tables.tasks(table)}
    protocol = {"limit": 9, "data": "mine"}
    entry = {"perplexity": [], "tasks": {"protocol": protocol, "tasks": found}}
    ours = tables.read(table, entry)
    assert ours.values == [25, 50, 50, 25, 50, 50, 50, pytest.approx(300 / 7)]
    assert ours.differs == ["the first 9 items of each task", "tasks from mine"]
    found["boolq"] = {"not_run": "no data"}
    ours = tables.read(table, entry)
    assert ours.values[0] is None
    assert ours.values[-1] is None
    assert ours.differs[-1] == "boolq: no data"


def test_cost_comes_in_the_papers_units(scripts: dict[str, Any]) -> None:
    tables = scripts["paper_tables"]
    cost = {"parameters": 5.5e9, "macs_of_sequence": {"64": 351.7e9}}
    assert tables.read(tables.load("cce-3"), {"cost": cost}).values == [5.5, 351.7]


def test_iterations_are_the_papers_and_its_models_only(
    scripts: dict[str, Any], tmp_path: Path
) -> None:
    jobs, table = scripts["paper_jobs"], scripts["paper_tables"].load("cce-1")
    (own,) = [j for j in jobs.jobs(table, jobs.Asked(tmp_path)) if j.row.name == "cce-24"]
    (other,) = [j for j in jobs.jobs(table, jobs.Asked(tmp_path, MODEL)) if j.row.name == "cce-24"]
    assert jobs.pruner(jobs.configuration(own))["init_args"]["iterations"] == 4
    assert "--sparsity" not in jobs.fit_command(own)
    assert "iterations" not in jobs.pruner(jobs.configuration(other))["init_args"]
    assert jobs.fit_command(other)[5:7] == ["--sparsity", "0.24"]
