"""Whatever the README shows works as printed, with a tiny model and text in place of the named."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_prune import TextDataModule
from lit_prune.callbacks import FASPPruning
from lit_prune.cli.front import main
from tests.tiny_fit import save_model, write_text

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.strip().replace("\\\n", " ")
    for line in re.findall(r"^ {4}lit-prune (?:.*\\\n)*.*$", README, re.MULTILINE)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the text of the README, in which its first block was run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("readme")
    save_model(folder / "dense")
    Path(write_text(folder, 90_000)).rename(folder / "my_text.txt")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    run(block("FASPPruning("))
    yield folder
    patch.undo()


def block(mark: str) -> str:
    """The README's only block of Python with a mark in it."""
    (found,) = [text for text in BLOCKS if mark in text]
    return found


def run(code: str) -> dict[str, Any]:
    """Run it with the tiny model instead of the named one, and fewer steps."""
    code = code.replace("HuggingFaceTB/SmolLM2-135M", "dense").replace("=100", "=4")
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_fit_takes_less_than_ten_lines():
    lines = [line for line in block("FASPPruning(").splitlines() if line.strip()]
    assert len(lines) < 10


def test_the_result_loads_as_printed(place: Path):
    plain, own = run(block("AutoModelForCausalLM")), run(block("load_pruned"))
    words = plain["tokenizer"]("w1 w2 w3", return_tensors="pt")
    for model in (plain["model"], own["model"]):
        text = model.generate(**words, max_new_tokens=3, do_sample=False)
        assert text.shape == (1, 6)
    assert (place / "runs" / "smaller" / "pruned" / "README.md").is_file()


def test_a_module_and_a_callback_of_ones_own(place: Path):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = AutoModelForCausalLM.from_pretrained("dense")

        def forward(self, batch: Any) -> Any:
            return self.lm(batch["input_ids"], attention_mask=batch["attention_mask"])

    tokenizer = AutoTokenizer.from_pretrained("dense")
    module = run(block("class MyModule"))["MyModule"](Net(), tokenizer)
    callback = run(block("class HalveFFN"))["HalveFFN"]()
    trainer = Trainer(
        max_steps=52,
        callbacks=[callback],
        default_root_dir=place / "own",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=TextDataModule("my_text.txt", length=16))
    assert type(trainer.optimizers[0]) is torch.optim.SGD
    assert {sizes["channel"] for sizes in module.structure.widths.layers} == {10}
    assert module.is_stock


def test_a_data_module_of_ones_own_needs_what_is_said(place: Path):
    with pytest.raises(Exception, match=re.escape("calibration_batches(samples, length, batch_s")):
        FASPPruning().draw(Trainer(logger=False))
    assert "`calibration_batches(samples, length, batch_size)`" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = shlex.split(command.partition(">")[0])[1:]
    words = ["dense" if word == "HuggingFaceTB/SmolLM2-135M" else word for word in words]
    if words[0] == "fit":
        for name in ("mine.yaml", "runs/smaller/config.yaml"):  # written by a run of the command
            (place / name).write_text("seed_everything: 0\n", encoding="utf-8")
        (place / "runs" / "smaller" / "config.yaml").write_text("model:\n  pretrained: dense\n")
        assert main([*words, "--print_config"]) == 0
        assert "default_root_dir" in capsys.readouterr().out
    elif words[0] == "prune-streaming":
        words = ["dense" if word == "DIR" else word for word in words]
        assert main(words) == 2  # the text is too short for the configuration's samples
        assert "expected" in capsys.readouterr().err
    elif words[0] == "export":
        (place / "runs" / "smaller" / "config.yaml").unlink(missing_ok=True)
        assert main(words) == 2  # the block of Python left no config.yaml to export from
        assert "expected a run's folder with a config.yaml" in capsys.readouterr().err
    elif words[0] == "evaluate":
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: {"text": ["w1 w2"] * 9000})
        assert main([*words, "--speed", "false"]) == 2  # the tiny model has few positions
        assert "positions, got 2048" in capsys.readouterr().err
    elif words[0] == "compare":
        assert main(words[:2]) == 0
        assert "parameters" in capsys.readouterr().out
    else:
        assert main(words) == 0
        assert "channel" in capsys.readouterr().out


def test_every_option_named_in_the_tables_exists(capsys: pytest.CaptureFixture[str]):
    for command in ("fit", "evaluate", "compare", "export", "inspect"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    scripts = {"--slow", "--out", "--data", "--text", "--samples", "--run", "--model"}
    named = set(re.findall(r"`(--[\w.-]+)", README)) - scripts
    assert "--data.train" in named
    missing = {name for name in named if not re.search(re.escape(name) + r"\b", shown)}
    assert missing == set()


def test_every_metric_in_the_code_is_in_the_readme():
    found: set[str] = set()
    for path in [ROOT / "lit_prune" / "module.py", *(ROOT / "callbacks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^(?:train|val|test)/\w*", node.value))
    assert found >= {"train/", "val/perplexity", "test/perplexity"}
    assert all(name in README for name in found)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            heading = target[1:].replace("-", " ")
            assert heading in re.sub(r"[^\w\s]", "", README.lower())
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file()
