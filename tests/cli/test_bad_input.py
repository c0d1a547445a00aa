"""What a user can do wrong, through the real command: one line, code 2, nothing left behind."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_prune.cli.front import main
from tests.cli.conftest import PROGRESS, Command, Workspace, snapshot
from tests.structure.tiny import tiny_model
from tests.tiny_fit import make_tokenizer, save_model

Check = Callable[..., None]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is called in, with a file of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def assert_one_line(err: str, words: str) -> None:
    *before, last = err.splitlines()
    assert all(line.startswith(PROGRESS) for line in before), err
    assert last.startswith("lit-prune: error: "), err
    assert words in last
    assert err.endswith("\n")


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Check:
    """Runs the command in this process and holds that it refuses."""

    def check(*args: str, words: str) -> None:
        before = snapshot(place)
        capfd.readouterr()
        assert main(args) == 2
        assert_one_line(capfd.readouterr().err, words)
        assert snapshot(place) == before

    return check


@pytest.fixture
def refused_by_process(place: Path, command: Command) -> Check:
    """The same in a process of its own."""

    def check(*args: str, words: str, **options: Any) -> None:
        before = snapshot(place)
        done = command(*args, cwd=place, **options)
        assert done.returncode == 2, done.stderr
        assert_one_line(done.stderr, words)
        assert snapshot(place) == before

    return check


def coarse_model(folder: Path) -> str:
    """Four wide channels beside hardly any attention."""
    return save_model(
        folder,
        "llama",
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        intermediate_size=4,
    )


def test_a_target_out_of_reach(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    config = workspace.config(tmp_path / "x.yaml", fasppruning={"sparsity": 0.9})
    refused("fit", "--config", config, words="got 0.9; the nearest is 0.297 and the most is 0.297")


def test_a_target_between_what_can_be_reached(
    workspace: Workspace, tmp_path: Path, refused: Check
) -> None:
    model = coarse_model(tmp_path / "model")
    config = workspace.config(
        tmp_path / "x.yaml", model={"pretrained": model}, fasppruning={"sparsity": 0.15}
    )
    words = "expected a sparsity that cutting channel can reach, got 0.15; the nearest is 0.107"
    refused("fit", "--config", config, "--stock", words=words)


@pytest.mark.parametrize("sparsity", [1.5, -0.1])
def test_a_sparsity_that_is_none(
    workspace: Workspace, tmp_path: Path, refused: Check, sparsity: float
) -> None:
    config = workspace.config(tmp_path / "x.yaml", fasppruning={"sparsity": sparsity})
    refused("fit", "--config", config, words=f"sparsity from 0 to below 1, got {sparsity:g}")


@pytest.mark.parametrize(
    ("data", "fasp", "words"),
    [
        ({"length": 2000}, {}, "windows of 2000 tokens in the training part of text.txt"),
        ({}, {"length": 2000}, "8 windows of 2000 tokens in the calibration part of text.txt"),
        ({}, {"samples": 2000}, "2000 windows of 8 tokens in the calibration part of text.txt"),
        (
            {"window": 2000, "validation_tokens": 2000},
            {},
            "windows of 2000 tokens in the validation part of text.txt",
        ),
    ],
)
def test_a_text_shorter_than_a_window(
    workspace: Workspace,
    tmp_path: Path,
    refused: Check,
    data: dict[str, Any],
    fasp: dict[str, Any],
    words: str,
) -> None:
    config = workspace.config(tmp_path / "x.yaml", data=data, fasppruning=fasp)
    refused("fit", "--config", config, words=words)


def test_a_text_shorter_than_a_window_in_a_process(
    workspace: Workspace, tmp_path: Path, refused_by_process: Check
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    config = workspace.config(tmp_path / "x.yaml", data={"train": str(tmp_path / "short.txt")})
    words = "windows of 8 tokens in the training part of short.txt, got 2 tokens, 0 windows"
    refused_by_process("fit", "--config", config, words=words)


def test_a_tokenizer_that_does_not_fit(
    workspace: Workspace, tmp_path: Path, refused: Check
) -> None:
    model = save_model(tmp_path / "model", vocab_size=40)
    config = workspace.config(tmp_path / "x.yaml", model={"pretrained": model})
    words = "token ids below the model's vocabulary of 40, got 60 from a tokenizer of 61 tokens"
    refused("fit", "--config", config, words=words)
    other = workspace.config(tmp_path / "y.yaml", data={"tokenizer": workspace.model})
    refused("fit", "--config", other, "--model.pretrained", model, words=words)


def test_no_tokenizer(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    model: Any = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    config = workspace.config(tmp_path / "x.yaml", model={"pretrained": str(tmp_path / "model")})
    refused("fit", "--config", config, words="expected a tokenizer, got none")


@pytest.mark.parametrize("axis", ["layer", "grup"])
def test_an_unknown_axis(workspace: Workspace, tmp_path: Path, refused: Check, axis: str) -> None:
    config = workspace.config(tmp_path / "x.yaml", fasppruning={"axes": [axis]})
    words = f"expected one of 'channel', 'group', 'query', 'value', 'hidden', got {axis}"
    refused("fit", "--config", config, words=words)


def test_an_axis_that_the_family_has_not(
    workspace: Workspace, tmp_path: Path, refused: Check
) -> None:
    model = save_model(tmp_path / "model", "gpt2")
    changes: dict[str, Any] = {"model": {"pretrained": model}}
    config = workspace.config(tmp_path / "x.yaml", fasppruning={"axes": ["query"]}, **changes)
    refused("fit", "--config", config, words="gpt2 can cut (channel, group, value, hidden, layer)")
    config = workspace.config(tmp_path / "y.yaml", fasppruning={"axes": ["group"]}, **changes)
    words = "the config of gpt2 can express, got 'group', for which it would need a field for head"
    refused("fit", "--config", config, "--stock", words=words)


def test_missing_files(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    config = workspace.config(tmp_path / "x.yaml")
    fit = ("fit", "--config", config)
    refused(*fit, "--data.train", "no/text.txt", words="got 'no/text.txt', which does not exist")
    refused(*fit, "--data.validation", "no.txt", words="got 'no.txt', which does not exist")
    refused(*fit, "--model.pretrained", "./no/model", words="at './no/model', got nothing there")
    refused(
        *fit,
        "--model.pretrained",
        "no-such/model",
        words="got no connection and no copy, nor a folder of that name",
    )
    refused(*fit, "--model.pretrained", "no.gguf", words="expected a GGUF file at no.gguf")
    refused(*fit, "--ckpt_path", "no.ckpt", words="got no.ckpt, which does not exist")
    refused("fit", "--config", "no.yaml", words="shipped configuration (cce, fasp, ")
    refused("export", "no", "--out", "out", words="a run's folder with a config.yaml, got no")
    refused("inspect", "./no/model", words="at './no/model', got nothing there")


def test_missing_files_in_a_process(
    workspace: Workspace, tmp_path: Path, refused_by_process: Check
) -> None:
    config = workspace.config(tmp_path / "x.yaml")
    words = "got 'no.txt', which does not exist"
    refused_by_process("fit", "--config", config, "--data.train", "no.txt", words=words)


@pytest.mark.parametrize("without", [[], ["GainLossReport"]])
def test_nan_in_the_calibration(
    workspace: Workspace, tmp_path: Path, refused: Check, without: list[str]
) -> None:
    model = save_model(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    changes: dict[str, Any] = {"model": {"pretrained": model}, "without": without}
    words = (
        "NaN or infinity at the input of model.layers.1.mlp.down_proj; check the model's weights"
        if without
        else "expected a finite loss, got NaN in evaluation batch 0 of 'perplexity of the dense"
    )
    refused("fit", "--config", workspace.config(tmp_path / "x.yaml", **changes), words=words)


def test_nan_in_a_process(workspace: Workspace, tmp_path: Path, refused_by_process: Check) -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    config = workspace.config(
        tmp_path / "x.yaml",
        model={"pretrained": str(tmp_path / "model")},
        without=["GainLossReport"],
    )
    words = "expected finite calibration activations, got NaN or infinity at the input of"
    refused_by_process("fit", "--config", config, words=words)


def write(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("old")


def test_existing_output(workspace: Workspace, tmp_path: Path, place: Path, refused: Check) -> None:
    config = workspace.config(tmp_path / "x.yaml")
    fit = ("fit", "--config", config, "--trainer.default_root_dir")
    write(place / "a/config.yaml", place / "b/pruned/holiday.jpg", place / "c", place / "d/x.txt")
    refused(*fit, "a", words="a holds a run (config.yaml)")
    refused(*fit, "b", words="b holds a run (pruned)")
    refused(*fit, "b", "--overwrite", words="b holds pruned of another origin")
    refused(*fit, "c", words="expected a folder for the run, got the file c")
    # a folder of another name, in which the fit would end
    other = workspace.config(tmp_path / "y.yaml", exportcheckpoint={"folder": "../d"})
    words = "d, got a folder with other files"
    refused("fit", "--config", other, "--trainer.default_root_dir", "e", words=words)


def test_a_typo(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    config = workspace.config(tmp_path / "x.yaml")
    fit = ("fit", "--config", config)
    refused(*fit, "--model.pretraind", "x", words="did you mean --model.pretrained?")
    refused(*fit, "--data.lenght", "8", words="did you mean --data.length?")
    refused(*fit, "--model.dtype", "bf16", words="--model.dtype: expected one of 'auto', 'float32'")
    refused("fti", words="did you mean 'fit'?")
    refused("fit", "--config", "fsap", words="quickstart, random, taylor, vib, wanda), got 'fsap'")
    refused("inspect", workspace.model, "--sparsty", "0.2", words="did you mean --sparsity?")
    refused("export", "run", "--ouut", "x", words="did you mean --out?")
    other = workspace.config(tmp_path / "y.yaml", fasppruning={"sparsty": 0.2})
    words = "FASPPruning: expected a known argument, got sparsty (did you mean sparsity?)"
    refused("fit", "--config", other, words=words)
    other = workspace.config(tmp_path / "z.yaml", data={"lenght": 8})
    refused("fit", "--config", other, words="did you mean data.length?")
    other = workspace.config(tmp_path / "w.yaml", lorarecovery={"targets": ["q_prj"]})
    refused("fit", "--config", other, words="expected LoRA targets out of down_proj, gate_proj")


def test_an_unknown_method(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    text = Path(workspace.config(tmp_path / "x.yaml")).read_text()
    (tmp_path / "x.yaml").write_text(text.replace("FASPPruning", "FSAPPruning"))
    refused("fit", "--config", str(tmp_path / "x.yaml"), words="FSAPPruning")


def test_a_typo_in_a_process(
    workspace: Workspace, tmp_path: Path, refused_by_process: Check
) -> None:
    config = workspace.config(tmp_path / "x.yaml")
    words = "did you mean --trainer.max_steps?"
    refused_by_process("fit", "--config", config, "--trainer.max_stps", "2", words=words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # the checkpoint with optimizer and adapter is larger than the model
        ({"without": ["ExportCheckpoint"]}, "checkpoints/last.ckpt"),
        (
            {"without": ["GainLossReport"], "trainer": {"enable_checkpointing": False}},
            "lit-prune-run/pruned",
        ),
    ],
)
def test_a_full_disk(
    workspace: Workspace,
    tmp_path: Path,
    refused_by_process: Check,
    changes: dict[str, Any],
    words: str,
) -> None:
    config = workspace.config(tmp_path / "x.yaml", **changes)
    size = 50_000  # between the small files of a run and the weights

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    refused_by_process("fit", "--config", config, words=words, preexec_fn=limit)


def test_an_unknown_family(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    model = tmp_path / "model"
    make_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8}))
    config = workspace.config(tmp_path / "x.yaml", model={"pretrained": str(model)})
    words = "phi3, qwen2, qwen3), got model_type 'mamba'; to add it, write its modules into"
    refused("fit", "--config", config, words=words)
    refused("inspect", str(model), words=words)


def test_code_of_the_models_own(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    model = tmp_path / "model"
    make_tokenizer().save_pretrained(model)
    (model / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}})
    )
    (model / "code.py").write_text("raise SystemExit('it ran')")
    config = workspace.config(tmp_path / "x.yaml", model={"pretrained": str(model)})
    words = "code of its own; read it, then pass --model.trust_remote_code true"
    refused("fit", "--config", config, words=words)
    refused("inspect", str(model), words="then pass --trust_remote_code true")


def test_stock_with_protected_layers(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    config = workspace.config(tmp_path / "x.yaml", fasppruning={"protected_layers": [0]})
    refused("fit", "--config", config, "--stock", words="no protected layers under --stock")
    config = workspace.config(tmp_path / "y.yaml", fasppruning={"protected_layers": [7]})
    refused("fit", "--config", config, words="protected layers from 0 to 2, got 7")


def test_numbers_that_can_not_be(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    fit = ("fit", "--config", workspace.config(tmp_path / "x.yaml"))
    refused(*fit, "--model.learning_rate", "-1", words="of at least 0 and warmup from 0 to 1")
    refused(*fit, "--model.warmup", "2", words="warmup from 0 to 1, got 0.01, 0 and 2")
    refused(*fit, "--seed_everything", "-1", words="--seed_everything from 0 to 4294967295, got -1")
    refused(*fit, "--trainer.accumulate_grad_batches", "0", words="of at least 1, got 0")
    refused(*fit, "--trainer.max_steps", "-5", words="`max_steps` must be a non-negative integer")
    refused(*fit, "--data.batch_size", "0", words="expected batch_size of at least 1, got 0")
    refused(*fit, "--sparsity", "1.5", words="sparsity from 0 to below 1, got 1.5")
    one = ("--trainer.callbacks=lit_prune.callbacks.FASPPruning", "--sparsity", "1.5")
    given = ("--model.pretrained", workspace.model, "--data.train", workspace.text)
    refused("fit", *given, *one, words="sparsity from 0 to below 1, got 1.5")
    endless = ("--trainer.max_steps", "-1", "--trainer.max_time", "00:00:01:00")
    refused(*fit, *endless, words="expected --trainer.max_steps or --trainer.max_epochs, got neit")
    refused(*fit, "--data.train", "", words="or the name of a text, got an empty word")
    spawn = ("--trainer.strategy", "ddp_spawn", "--trainer.devices", "2")
    refused(*fit, *spawn, words="such as ddp, got ddp_spawn")
    for callback, arguments, words in (
        ("fasppruning", {"samples": 0}, "expected samples of at least 1, got 0"),
        ("fasppruning", {"delta": 0}, "expected a delta above 0, got 0"),
        ("lorarecovery", {"rank": 0}, "expected LoRA with rank >= 1"),
        ("distillation", {"task": 0.0, "kl": 0.0}, "weights of at least 0, one of them above"),
        ("distillation", {"temperature": 0.0}, "expected a temperature above 0, got 0"),
        ("gainlossreport", {"rounds": -1}, "expected rounds of at least 0"),
    ):
        other = workspace.config(tmp_path / "y.yaml", **{callback: arguments})
        refused("fit", "--config", other, words=words)


def test_texts_that_can_not_be(workspace: Workspace, tmp_path: Path, refused: Check) -> None:
    fit = ("fit", "--config", workspace.config(tmp_path / "x.yaml"), "--data.train")
    for name, content, words in (
        ("bytes.txt", b"\xff\xfe\x00w1", "expected UTF-8 text in bytes.txt"),
        ("empty.txt", b" \n", "expected some text in empty.txt, got none"),
        ("table.csv", b"w1,w2", "expected a text with one of the suffixes .txt, .md, .jsonl"),
        ("half.jsonl", b'{"text": "w1"}\n{"te', "JSON in half.jsonl, got an error in line 2"),
    ):
        (tmp_path / name).write_bytes(content)
        refused(*fit, str(tmp_path / name), words=words)
