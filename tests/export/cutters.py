"""Tiny random models and literal cuts, independent of lit_prune.structure."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
)

_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA: dict[str, Any] = _SIZES | {"num_key_value_heads": 2, "intermediate_size": 20}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_GQA, attention_bias=True, mlp_bias=True),
    "llama-tied": LlamaConfig(**_GQA, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(
        **_GQA,
        head_dim=6,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**_GQA),
    "gpt_neox": GPTNeoXConfig(**_SIZES, intermediate_size=20),
    "gpt2": GPT2Config(**_SIZES, n_inner=20),
    "bloom": BloomConfig(**_SIZES),
    "falcon-alibi": FalconConfig(
        **_SIZES,
        alibi=True,
        multi_query=False,
        new_decoder_architecture=False,
        parallel_attn=False,
        bias=True,
    ),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> Any:
    """A model whose every parameter is random, loaded as from a checkpoint in that dtype."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    options = {} if attention is None else {"attn_implementation": attention}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def ids(length: int = 12) -> Tensor:
    """Token ids [2, length] without the special ones."""
    return torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids() if tokens is None else tokens).logits


def _replace(module: Any, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value.detach().clone()))


def _rows(linear: Any, keep: list[int]) -> None:
    _replace(linear, "weight", linear.weight[keep])
    if linear.bias is not None:
        _replace(linear, "bias", linear.bias[keep])
    linear.out_features = len(keep)


def _columns(linear: Any, keep: list[int]) -> None:
    _replace(linear, "weight", linear.weight[:, keep])
    linear.in_features = len(keep)


def cut_channels(model: Any, widths: list[int]) -> None:
    """Keep the last channels of each layer's gated MLP (llama and gemma)."""
    for layer, width in zip(model.model.layers, widths, strict=True):
        mlp = layer.mlp
        keep = list(range(mlp.down_proj.in_features))[-width:]
        _rows(mlp.gate_proj, keep)
        _rows(mlp.up_proj, keep)
        _columns(mlp.down_proj, keep)
        mlp.intermediate_size = width


def cut_gpt2_channels(model: Any, widths: list[int]) -> None:
    """The same for gpt2, whose Conv1D weights are [in, out]."""
    for block, width in zip(model.transformer.h, widths, strict=True):
        mlp = block.mlp
        _replace(mlp.c_fc, "weight", mlp.c_fc.weight[:, -width:])
        _replace(mlp.c_fc, "bias", mlp.c_fc.bias[-width:])
        _replace(mlp.c_proj, "weight", mlp.c_proj.weight[-width:])
        mlp.c_fc.nf = mlp.c_proj.nx = width


def drop_layer(model: Any, index: int) -> None:
    """Remove a decoder layer of a llama-like model."""
    layers = model.model.layers
    del layers[index]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [
            kind for place, kind in enumerate(model.config.layer_types) if place != index
        ]
    model.config.num_hidden_layers = len(layers)


def with_width(config: Any, **fields: Any) -> Any:
    """The stock config a cut would propose."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def cut_alibi_heads(model: Any, kept: list[list[int]], *, mask_only: bool = False) -> None:
    """Keep some heads of each layer of bloom or of falcon with ALiBi: (group 3 head_dim) rows.

    With `mask_only` the other heads' output is removed but nothing is cut: the reference.
    """
    from lit_prune.export.modeling_lit_pruned import keep_heads

    for block, heads in zip(model.transformer.h, kept, strict=True):
        attention = getattr(block, "self_attention")  # noqa: B009
        size, dense = attention.head_dim, attention.num_heads
        columns = [head * size + i for head in heads for i in range(size)]
        if mask_only:
            gone = sorted(set(range(dense * size)) - set(columns))
            attention.dense.weight.data[:, gone] = 0
            continue
        rows = [head * 3 * size + i for head in heads for i in range(3 * size)]
        _rows(attention.query_key_value, rows)
        _columns(attention.dense, columns)
        attention.num_heads = attention.num_kv_heads = len(heads)
        attention.hidden_size = len(heads) * size
        keep_heads(attention, heads, dense)


def cut_phi3_groups(model: Any, kept: list[int]) -> None:
    """Keep the first KV groups of each layer of phi3, whose attention reads the config."""
    for layer, groups in zip(model.model.layers, kept, strict=True):
        attention = layer.self_attn
        size, queries = attention.head_dim, attention.num_key_value_groups
        old = model.config.num_key_value_heads
        heads, dense = groups * queries, old * queries
        query = list(range(heads * size))
        key = [dense * size + i for i in range(groups * size)]
        value = [(dense + old) * size + i for i in range(groups * size)]
        _rows(attention.qkv_proj, query + key + value)
        _columns(attention.o_proj, query)
        attention.num_key_value_heads = groups
        attention.config = with_width(
            model.config, num_attention_heads=heads, num_key_value_heads=groups
        )


_VALUE_NAMES = {"gpt2": ("c_attn", "c_proj"), "phi3": ("qkv_proj", "o_proj")}


def cut_values(model: Any, kept: list[list[int]], *, mask_only: bool = False) -> None:
    """Keep some value features in each layer of llama, gpt2 or phi3: the same of every KV head.

    With `mask_only` what O reads of the others is removed but nothing is cut: the reference.
    """
    from lit_prune.export.modeling_lit_pruned import narrow_values

    config = model.config
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", heads)
    writer, reader = _VALUE_NAMES.get(config.model_type, ("v_proj", "o_proj"))
    layers = model.transformer.h if config.model_type == "gpt2" else model.model.layers
    for layer, features in zip(layers, kept, strict=True):
        attention = layer.attn if config.model_type == "gpt2" else layer.self_attn
        size = attention.head_dim
        before = 0 if writer == "v_proj" else (heads + groups) * size
        columns = [head * size + i for head in range(heads) for i in features]
        rows = [before + group * size + i for group in range(groups) for i in features]
        write, read = getattr(attention, writer), getattr(attention, reader)
        if mask_only:
            gone = sorted(set(range(heads * size)) - set(columns))
            (read.weight.data if writer == "c_attn" else read.weight.data.T)[gone] = 0
            continue
        _cut_two(write, [*range(before), *rows], read, columns)
        options = {"before": before, "value": len(features), "head_dim": size}
        narrow_values(attention, writer=writer, reader=reader, **options)


def _cut_two(write: Any, rows: list[int], read: Any, columns: list[int]) -> None:
    if isinstance(write, nn.Linear):
        _rows(write, rows)
        _columns(read, columns)
        return
    _replace(write, "weight", write.weight[:, rows])
    _replace(write, "bias", write.bias[rows])
    _replace(read, "weight", read.weight[columns])
    write.nf, read.nx = len(rows), len(columns)


def add_biases(model: Any) -> None:
    """Give a llama's O and down biases of their own in two layers of three."""
    for number, layer in enumerate(model.model.layers[:2]):
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            bias = torch.arange(module.out_features) * 0.01 + number
            module.bias = nn.Parameter(bias.to(module.weight.dtype))


def cut_case(case: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """One of `CASES`: the cut model, and the stock config proposed for it or None."""
    model = tiny(case.split("/")[0], dtype)
    config = None
    match case.split("/")[1]:
        case "equal":
            cut_channels(model, [7, 7, 7])
            config = with_width(model.config, intermediate_size=7)
        case "layer":
            drop_layer(model, 1)
            config = model.config
        case "widths" if case.startswith("gpt2"):
            cut_gpt2_channels(model, [7, 9, 5])
        case "widths":
            cut_channels(model, [7, 9, 5])
            config = with_width(model.config, intermediate_size=7)
        case "widths-layer":
            cut_channels(model, [7, 9, 5])
            drop_layer(model, 0)
        case "dense":
            config = model.config
        case kind:
            _NEVER_STOCK[kind](model)
    return model, config


_NEVER_STOCK: dict[str, Callable[[Any], None]] = {
    "heads": lambda model: cut_alibi_heads(model, [[0, 2], [1, 2, 3], [3]]),
    "groups": lambda model: cut_phi3_groups(model, [2, 1, 1]),
    "values": lambda model: cut_values(model, [[0, 2, 3], [1, 5], [0, 1, 2, 3, 4]]),
    "biases": add_biases,
}


#: Case -> whether it is stock.
CASES = {
    "llama/equal": True,
    "llama-tied/equal": True,
    "llama/layer": True,
    "gemma3/layer": True,
    "gpt_neox/dense": True,
    "llama/widths": False,
    "llama-tied/widths-layer": False,
    "gemma3/widths-layer": False,
    "gpt2/widths": False,
    "llama/values": False,
    "gpt2/values": False,
    "phi3/values": False,
    "llama-tied/biases": False,
    "phi3/groups": False,
    "bloom/heads": False,
    "falcon-alibi/heads": False,
}
