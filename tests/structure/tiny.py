"""Tiny random models of every family: two KV groups and two queries a group where there is GQA."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

_LAYERS = 3
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OLD = {k: v for k, v in _LLAMA.items() if k not in {"num_key_value_heads", "head_dim"}} | {
    "num_attention_heads": 4
}
_LLAMA |= {"hidden_size": 36}  # a multiple of the heads, and not heads * head_dim
_SLIDING = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

#: Row: name -> (model_type, config values).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 5}),
    "qwen2": ("qwen2", {**_LLAMA, **_SLIDING, "use_sliding_window": True, "head_dim": 6}),
    "qwen3": ("qwen3", {**_LLAMA, "attention_bias": True}),
    "gemma2": ("gemma2", {**_LLAMA, **_SLIDING, "query_pre_attn_scalar": 8}),
    "gemma2-untied": (
        "gemma2",
        {**_LLAMA, **_SLIDING, "query_pre_attn_scalar": 8, "tie_word_embeddings": False},
    ),
    "gemma3": ("gemma3_text", {**_LLAMA, **_SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {**_LLAMA, "head_dim": 6}),
    "glm": ("glm", _LLAMA),
    "gpt2": ("gpt2", {**_OLD, "intermediate_size": None, "n_inner": 20}),
    "gpt_neox": ("gpt_neox", _OLD),
    "bloom": ("bloom", {**_OLD, "intermediate_size": None}),
    "falcon-new": (
        "falcon",
        {
            **_OLD,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "ffn_hidden_size": 20,
        },
    ),
    "falcon-7b": ("falcon", {**_OLD, "multi_query": True, "bias": True}),
    "falcon-rw": (
        "falcon",
        {**_OLD, "multi_query": False, "bias": True, "alibi": True, "parallel_attn": False},
    ),
    "opt": ("opt", {**_OLD, "ffn_dim": 20, "word_embed_proj_dim": 32, "intermediate_size": None}),
    "opt-factorised": (
        "opt",
        {
            **_OLD,
            "ffn_dim": 20,
            "word_embed_proj_dim": 12,
            "do_layer_norm_before": False,
            "intermediate_size": None,
        },
    ),
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The tiny config of a row of the table."""
    model_type, values = FAMILIES[name]
    values = {key: value for key, value in values.items() if value is not None}
    return AutoConfig.for_model(model_type, **{**values, **changes})


def tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> nn.Module:
    """A tiny model with random weights, biases and norms, in eval mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # initial zeros and ones hide errors
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model
