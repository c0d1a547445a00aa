"""The fits that `kill_campaign.py` kills: a tiny model and three methods."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

_WORDS = 58
_SMALL = {"samples": 8, "length": 16, "batch_size": 2}
#: Callback, its options, and the fit's steps. Checkpoints are made every third step.
METHODS: dict[str, tuple[str, dict[str, Any], int]] = {
    "fasp": ("FASPPruning", {"axes": ["group", "channel"], **_SMALL}, 8),
    "cce": ("CoupledComponentPruning", {"sparsity": 0.4, "start": 2, "every": 2, **_SMALL}, 10),
    "vib": ("VIBPruning", {"steps": 5, "rate": 10.0, "multiple": 0, **_SMALL}, 10),
}


def configuration(method: str, inputs: Path, folder: Path) -> dict[str, Any]:
    """The configuration of a fit."""
    name, options, steps = METHODS[method]
    saver = {"save_last": True, "save_top_k": 0, "every_n_train_steps": 3}
    marking = {"file": str(folder.with_suffix(".marks")), "masks": method == "vib"}
    package = "lit_prune.callbacks."
    callbacks = {
        "kill_marks.PhaseMarks": marking,
        f"{package}RandomState": {},
        package + name: options,
        f"{package}LoRARecovery": {"rank": 2, "alpha": 4, "dropout": 0.1},
        f"{package}Distillation": {},
        f"{package}GainLossReport": {"rounds": 0},
        f"{package}ExportCheckpoint": {},
        "lit_prune.cli.saving.LastCheckpoint": {**saver, "enable_version_counter": False},
    }
    return {
        "model": {"pretrained": str(inputs / "model"), "dtype": "float32", "learning_rate": 1e-2},
        "data": {
            "train": str(inputs / "text.txt"),
            "length": 16,
            "batch_size": 2,
            "window": 16,
            "validation_tokens": 64,
            "cache_dir": str(inputs / "cache"),
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "log_every_n_steps": 1,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": k, "init_args": v} for k, v in callbacks.items()],
        },
    }


def make_inputs(folder: Path) -> None:
    """Write a tiny Llama with a word tokenizer, and a text of its words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_WORDS + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(_WORDS))]
    backend: Any = Tokenizer(
        WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder / "model")
    draw, word, text = random.Random(0), 0, []
    for _ in range(4000):
        word = (word + draw.choice([1, 1, 1, 2, 7])) % _WORDS
        text.append(f"w{word}")
    (folder / "text.txt").write_text(" ".join(text), encoding="utf-8")
