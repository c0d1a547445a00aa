from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from lit_prune.errors import UserError
from lit_prune.export import checkpoint, export_checkpoint, load_pruned, read_lineage
from tests.export.cutters import CASES, cut_case, ids, logits

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Run where lit_prune cannot be imported: load, compute, save again and load that.
_STRANGER = """
import sys
sys.modules["lit_prune"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokens, results = load_file("tokens.safetensors")["tokens"], {}
for line in open("folders.txt"):
    folder, trusted = line.split()
    for source in (folder, folder + "-again"):
        model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trusted == "1")
        with torch.no_grad():
            results[source] = model(input_ids=tokens).logits
        results[source + "-text"] = model.generate(
            tokens[:, :5], max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        if source == folder:
            model.save_pretrained(folder + "-again")
            assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids == [4, 5]
save_file(results, "results.safetensors")
"""


def export(case: str, out: Path, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    model, config = cut_case(case, dtype)
    stock = export_checkpoint(
        model, tokenizer, out, config=config, layout={"layers": [1]}, lineage=["cut"], card="# A\n"
    )
    assert stock is CASES[case]
    return model


def test_a_stranger_gets_the_same_logits(tmp_path: Path, tokenizer: Any) -> None:
    models, lines = {}, []
    for number, case in enumerate(CASES):
        for kind, dtype in DTYPES.items():
            folder = f"{kind}{number}"
            models[folder] = export(case, tmp_path / folder, tokenizer, dtype)
            lines.append(f"{folder} {int(not CASES[case])}\n")
    (tmp_path / "folders.txt").write_text("".join(lines))
    save_file({"tokens": ids()}, tmp_path / "tokens.safetensors")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-I", "-W", "ignore", "-c", _STRANGER]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = load_file(tmp_path / "results.safetensors")
    assert len(results) == 4 * len(models)
    for folder, model in models.items():
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        text = model.generate(ids()[:, :5], **options)
        for name in (folder, f"{folder}-again"):
            assert results[name].dtype == model.dtype
            assert torch.equal(results[name], logits(model)), name
            assert torch.equal(results[f"{name}-text"], text), name


def test_what_lies_in_the_folder(tmp_path: Path, tokenizer: Any) -> None:
    export("llama/equal", tmp_path / "stock", tokenizer)
    export("llama/widths", tmp_path / "cut", tokenizer)
    common = {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lit_prune.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(os.listdir(tmp_path / "stock")) == common
    assert set(os.listdir(tmp_path / "cut")) == common | {"modeling_lit_pruned.py"}
    assert sorted(os.listdir(tmp_path)) == ["cut", "stock"]
    stock = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert stock["model_type"] == "llama"
    assert stock["architectures"] == ["LlamaForCausalLM"]
    assert stock["intermediate_size"] == 7
    assert not [key for key in stock if "prune" in key or "auto_map" in key]
    cut = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert cut["model_type"] == "lit_pruned_llama"
    assert cut["intermediate_size"] == 20
    assert cut["lit_prune"]["layout"] == {"layers": [1]}
    assert cut["lit_prune"]["shapes"]["model.layers.1.mlp.up_proj.weight"] == [9, 24]
    assert (tmp_path / "cut" / "README.md").read_text() == "# A\n"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert loaded.chat_template == tokenizer.chat_template


def test_lineage_is_kept(tmp_path: Path) -> None:
    export("llama/widths", tmp_path / "out")
    found = read_lineage(tmp_path / "out")
    assert found["stock"] is False
    assert found["lineage"] == ["cut"]
    assert found["layout"] == {"layers": [1]}
    assert set(found["versions"]) == {"lit_prune", "torch", "transformers"}
    assert read_lineage(tmp_path)["lineage"] == []
    (tmp_path / "out" / "lit_prune.json").write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        read_lineage(tmp_path / "out")


def test_nothing_of_the_source_is_exported(tmp_path: Path) -> None:
    model, _ = cut_case("llama/widths")
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config._name_or_path = model.generation_config._name_or_path = "/a/path/here"
    export_checkpoint(model, None, tmp_path / "o", config=None, layout={}, lineage=[], card="")
    for file in ("config.json", "generation_config.json", "lit_prune.json"):
        text = (tmp_path / "o" / file).read_text()
        assert "/a/path" not in text
        assert "gguf" not in text


def test_a_generation_config_that_transformers_refuses_to_save(tmp_path: Path) -> None:
    model, config = cut_case("llama/equal")
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=False)
    export_checkpoint(model, None, tmp_path / "o", config=config, layout={}, lineage=[], card="")
    loaded = load_pruned(tmp_path / "o").generation_config
    assert (loaded.temperature, loaded.do_sample) == (0.7, True)


def test_the_model_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    model, config = cut_case("llama/widths")
    before, kind, fields = logits(model), type(model), model.config.to_dict()
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    export_checkpoint(model, None, tmp_path / "o", config=config, layout={}, lineage=[], card="")
    assert type(model) is kind
    assert model.config.to_dict() == fields
    assert pointers == [parameter.data_ptr() for parameter in model.parameters()]
    assert torch.equal(before, logits(model))


def test_shards(tmp_path: Path) -> None:
    model, _ = cut_case("llama/widths")
    options: dict[str, Any] = {"config": None, "layout": {}, "lineage": [], "card": ""}
    export_checkpoint(model, None, tmp_path / "o", max_shard_size="10KB", **options)
    assert (tmp_path / "o" / "model.safetensors.index.json").is_file()
    assert torch.equal(logits(load_pruned(tmp_path / "o")), logits(model))


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    export("llama/widths", tmp_path / "o")
    model = export("llama/equal", tmp_path / "o")
    assert "modeling_lit_pruned.py" not in os.listdir(tmp_path / "o")
    assert os.listdir(tmp_path) == ["o"]
    assert torch.equal(logits(load_pruned(tmp_path / "o")), logits(model))


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match="other files"):
        export("llama/widths", tmp_path / "o")
    with pytest.raises(UserError, match="got a file"):
        export("llama/widths", tmp_path / "o" / "thesis.tex")
    assert os.listdir(tmp_path / "o") == ["thesis.tex"]


def test_a_checkpoint_of_another_origin_is_not_replaced(tmp_path: Path) -> None:
    model, _ = cut_case("llama/widths")
    model.save_pretrained(tmp_path / "o")
    before = sorted(os.listdir(tmp_path / "o"))
    with pytest.raises(UserError, match=r"an earlier export at .*/o, got a folder with other"):
        export("llama/widths", tmp_path / "o")
    assert sorted(os.listdir(tmp_path / "o")) == before


def test_what_a_killed_export_left_is_cleared(tmp_path: Path) -> None:
    export("llama/widths", tmp_path / "o")
    (tmp_path / "o").rename(tmp_path / "o.old-1")  # killed between the two renames
    (tmp_path / "o.tmp-1").mkdir()
    (tmp_path / "o.tmp-1" / "config.json").write_text("{")
    (tmp_path / "o.old-backup").mkdir()  # not ours
    model, _ = cut_case("llama/widths")
    with checkpoint.export_folder(model, tmp_path / "o") as folder:
        assert sorted(os.listdir(tmp_path)) == ["o", "o.old-backup", folder.name]
        assert load_pruned(tmp_path / "o")
        (folder / "config.json").write_text("{")
    assert sorted(os.listdir(tmp_path)) == ["o", "o.old-backup"]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_and_the_earlier_export(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "save_pretrained", _full)
    with pytest.raises(UserError, match="disk space"):
        export("llama/widths", tmp_path / "new", tokenizer)
    assert os.listdir(tmp_path) == []
    model = export("llama/widths", tmp_path / "o")
    with pytest.raises(UserError, match="disk space"):
        export("llama/equal", tmp_path / "o", tokenizer)
    assert os.listdir(tmp_path) == ["o"]
    assert torch.equal(logits(load_pruned(tmp_path / "o")), logits(model))


def test_a_disk_that_is_too_small_is_seen_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="MB of free disk space"):
        export("llama/widths", tmp_path / "o")


def test_weights_that_do_not_fit_on_the_disk(tmp_path: Path) -> None:
    code = (
        "import resource, sys; sys.path.insert(0, '.')\n"
        "from tests.export.cutters import cut_case\n"
        "from lit_prune.export import export_checkpoint\n"
        "model, config = cut_case('llama/widths')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try: export_checkpoint(model, None, sys.argv[1], config=None, layout={}, lineage=[],"
        " card='')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "o")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("UserError expected enough disk space"), done.stderr[-2000:]
    assert os.listdir(tmp_path) == []


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="can be written"):
        export("llama/widths", tmp_path / "deep" / "o")


def test_a_model_that_is_not_only_cut_is_refused(tmp_path: Path) -> None:
    model, _ = cut_case("llama/widths")
    model.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="modules differ: adapter"):
        export_checkpoint(model, None, tmp_path / "o", config=None, layout={}, lineage=[], card="")
    assert os.listdir(tmp_path) == []


def test_a_class_of_its_own_cannot_be_exported_unless_stock(tmp_path: Path) -> None:
    model, _ = cut_case("llama/widths")
    model.__class__ = type("MyLlama", (type(model),), {})
    with pytest.raises(UserError, match="code of its own"):
        export_checkpoint(model, None, tmp_path / "o", config=None, layout={}, lineage=[], card="")
