"""Peak memory of inference, in real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.evaluation import footprint as module
from lit_prune.evaluation.footprint import footprint

MB = 2**20
SHORT: dict[str, Any] = {"prompt": 8, "new_tokens": 2}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for the processes


def write(folder: Path, layers: int) -> int:
    """Write a model of about 17 MB a layer; returns the bytes of its weights."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    model: Any = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_larger_model_needs_more(tmp_path: Path) -> None:
    weights = {name: write(tmp_path / name, n) for name, n in (("small", 1), ("large", 9))}
    found = {name: footprint(str(tmp_path / name), **SHORT) for name in weights}
    for name, entry in found.items():
        assert 0 < entry["baseline_bytes"] < entry["load_peak_bytes"]
        above = entry["peak_bytes"] - entry["baseline_bytes"]
        assert above > weights[name]
        assert "1 x 8 tokens, then 2 steps" in entry["how"]
    more = weights["large"] - weights["small"]
    assert more > 120 * MB
    assert 0.8 * more < found["large"]["peak_bytes"] - found["small"]["peak_bytes"] < 1.5 * more
    assert found["large"]["load_peak_bytes"] > found["small"]["load_peak_bytes"]


def test_a_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    access = {"trust_remote_code": False, "token": False}
    task = {"source": str(tmp_path), "dtype": "auto", "device": "cpu", "access": access}
    monkeypatch.setattr(module.sys, "argv", ["footprint", json.dumps(task)])
    with pytest.raises(SystemExit) as caught:
        module.main()
    said = str(caught.value.code)
    assert said.startswith("expected a model folder with a config.json")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (-9, "", "signal 9 ended the process; was memory short?"),
        (1, "Traceback\nRuntimeError: no\n", "RuntimeError: no"),
        (3, "", "exit code 3"),
    ],
)
def test_a_process_that_ends_badly(
    monkeypatch: pytest.MonkeyPatch, code: int, error: str, said: str
) -> None:
    done = module.subprocess.CompletedProcess([], code, "", error)
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **options: done)
    assert footprint("anything") == {"not_run": said}


def test_where_the_peak_cannot_be_restarted_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(module, "_STATUS", tmp_path / "none")  # as on other systems
    monkeypatch.setattr(module, "_RESTART", tmp_path / "none" / "none")
    access = {"trust_remote_code": False, "token": False}
    task = {"source": str(tmp_path), "dtype": "auto", "device": "cpu", "access": access}
    found = module.measure({**task, "batch_size": 1, **SHORT})
    assert "loading included" in found["how"]
    assert 100 * MB < found["baseline_bytes"] <= found["load_peak_bytes"] <= found["peak_bytes"]
    assert found["peak_bytes"] < 1000 * 1000 * MB
    assert json.loads(json.dumps(found)) == found
    assert torch.is_grad_enabled()
