"""report.json, the table and the lines that load the result."""

from __future__ import annotations

import json
import math
import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lit_prune.reporting.report import (
    build_report,
    load_lines,
    model_entry,
    print_report,
    render_table,
    table_rows,
    versions,
    write_report,
)


def entry(perplexity: Any = 20.0, **changes: Any) -> dict[str, Any]:
    values = {
        "perplexity": perplexity,
        "parameters": 1_234_567,
        "decoder_parameters": 1_000_000,
        "weight_bytes": 2_500_000,
        "tokens_per_second": [90.0, 10.0, 110.0],
    }
    return model_entry(**(values | changes))


def make_report(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "protocol": {"text": "sotu", "window": 2048, "tokens": 16376, "dtype": torch.bfloat16},
        "sparsity": {"target": 0.2, "decoder": 0.2001, "total": 0.1583},
        "models": {"dense": entry(), "pruned": entry(26.0), "recovered": entry(22.0)},
        "seconds": {"calibrate_and_prune": 12.34, "recover": 100.0},
        "method": "FASP",
        "options": {"sparsity": 0.2, "axes": ("channel",), "path": Path("x")},
    }
    return build_report(**(values | changes))


def printed(report: dict[str, Any], **options: Any) -> str:
    stream = StringIO()
    print_report(report, "run", console=Console(file=stream, width=80), **options)
    return stream.getvalue()


def strict_load(path: Path) -> Any:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_report_has_the_schema_and_goes_through_json(tmp_path: Path):
    report = make_report(warnings=["short text"])
    write_report(report, tmp_path / "new" / "report.json")
    loaded = strict_load(tmp_path / "new" / "report.json")

    assert loaded == report
    assert set(loaded) == {
        *("protocol", "method", "options", "sparsity", "models"),
        *("seconds", "versions", "warnings"),
    }
    assert loaded["protocol"]["dtype"] == "torch.bfloat16"
    assert loaded["models"]["pruned"] == {
        "perplexity": 26.0,
        "parameters": 1_234_567,
        "decoder_parameters": 1_000_000,
        "bytes": 2_500_000,
        "tokens_per_second": 90.0,
        "tokens_per_second_range": [10.0, 110.0],
    }
    assert loaded["options"] == {"sparsity": 0.2, "axes": ["channel"], "path": "x"}
    assert loaded["warnings"] == ["short text"]


def test_versions_name_what_a_result_depends_on():
    found = versions()
    assert set(found) == {"python", "torch", "lightning", "transformers", "peft", "lit_prune"}
    assert found["torch"] == torch.__version__


def test_numbers_that_are_not_finite_become_null_and_a_warning(tmp_path: Path):
    report = make_report(models={"dense": entry(math.nan), "pruned": entry(torch.tensor(2.0))})
    report["seconds"]["recover"] = math.inf
    write_report(report, tmp_path / "report.json")
    loaded = strict_load(tmp_path / "report.json")
    assert loaded["models"]["dense"]["perplexity"] is None
    assert loaded["models"]["pruned"]["perplexity"] == 2.0
    assert loaded["seconds"]["recover"] is None
    assert [note.split(" ")[0] for note in loaded["warnings"]] == [
        "models.dense.perplexity",
        "seconds.recover",
    ]


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.json"
    write_report(make_report(), path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_report(make_report(method="other"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_readable_as_any_new_file_is(tmp_path: Path):
    write_report(make_report(), tmp_path / "report.json")
    (tmp_path / "plain").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("report.json", "plain")]
    assert modes[0] == modes[1]


def test_rows_are_the_numbers_in_readable_form():
    assert table_rows(make_report()) == [
        ("dense", "20.00", "1.000", "1,234,567", "2.5", "90 (10-110)"),
        ("pruned", "26.00", "1.300", "1,234,567", "2.5", "90 (10-110)"),
        ("recovered", "22.00", "1.100", "1,234,567", "2.5", "90 (10-110)"),
    ]


def test_what_did_not_run_or_has_no_number_is_said():
    report = make_report(models={"dense": entry(None), "pruned": entry(tokens_per_second=[])})
    assert table_rows(report) == [
        ("dense", "-", "-", "1,234,567", "2.5", "90 (10-110)"),
        ("pruned", "20.00", "-", "1,234,567", "2.5", "-"),
        ("recovered", "not run", "-", "-", "-", "-"),
    ]
    assert "not run" in printed(report)


def test_table_fits_a_terminal():
    table = render_table(make_report())
    assert [column.header for column in table.columns][:2] == ["model", "perplexity"]
    assert table.row_count == 3
    assert all(len(line) <= 80 for line in printed(make_report()).splitlines()[:8])


def test_print_says_protocol_sparsity_time_and_notes():
    text = printed(make_report(warnings=["calibration text is short [sic]"]))
    assert "perplexity on sotu, 16,376 tokens, windows of 2,048, bfloat16" in text
    assert "removed 20.01% of the decoder's parameters (target 20.00%), 15.83% of all" in text
    assert "time: calibrate and prune 12.3 s, recover 100.0 s" in text
    assert "note: calibration text is short [sic]" in text


def test_protocol_names_what_else_it_was_given():
    protocol = {"text": "t", "window": 8, "tokens": 7, "dtype": "float32", "split": "validation"}
    assert "float32, split: validation" in printed(make_report(protocol=protocol))


@pytest.mark.parametrize("stock", [True, False])
def test_printed_lines_load_the_checkpoint(tmp_path: Path, stock: bool):
    stream = StringIO()
    folder = tmp_path / ("long " * 30 + '"name')  # a wrapped path can't be copied
    console = Console(file=stream, width=80)
    print_report(make_report(), folder, stock=stock, console=console)
    lines = load_lines(folder / "pruned", stock=stock)
    assert stream.getvalue().rstrip().endswith(lines)
    assert len(lines.splitlines()) == 3
    assert lines.count("trust_remote_code=True") == (0 if stock else 2)  # tokenizer and model

    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(
        folder / "pruned"
    )
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "pruned")
    scope: dict[str, Any] = {}
    exec(lines, scope)
    assert scope["model"].config.n_embd == 4
    assert scope["tokenizer"].get_vocab() == {"a": 0, "b": 1}
