"""What a model costs, against what torch counts while it runs, and against its real cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_prune.evaluation.cost import cost
from lit_prune.evaluation.skeleton import skeleton
from lit_prune.export import export_checkpoint
from lit_prune.structure import Layout, Structure, cut, settle
from tests.structure.layouts import cuttable, varied
from tests.structure.tiny import FAMILIES, tiny_model

SHORT, LONG = 64, 2048


def cut_model(name: str, cutting: str) -> tuple[Any, Structure, Layout]:
    """A tiny model in which every product is a matmul, dense or with what its family can cut."""
    model: Any = tiny_model(name, attn_implementation="eager")
    structure = Structure.of(model)
    axes = {"dense": [], "cut": cuttable(structure)}
    axes["narrowed"] = [axis for axis in axes["cut"] if axis != "layer"]
    layout = Layout.full(structure.widths)
    if axes[cutting]:
        layout = varied(structure, axes[cutting])
        cut(model, structure, layout)
        settle(model, structure, layout)
    return model, structure, layout


def counted(model: Any, tokens: Tensor, **options: Any) -> tuple[int, Any]:
    """Multiply-accumulates of a forward pass, and its output."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(input_ids=tokens, use_cache=True, **options)
    flops = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    # the angles of rotary positions are made by a matmul in some cases, of head_dim / 2 a token
    angles = sum(count for name, count in flops.items() if name.endswith("rotary_emb"))
    assert angles <= tokens.numel() * 8
    return (counter.get_total_flops() - angles) // 2, output


def tokens(length: int) -> Tensor:
    return torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(0))


def cases() -> list[tuple[str, str]]:
    found = [(name, cutting) for name in FAMILIES for cutting in ("dense", "cut")]
    # where layers are of two kinds, of which one is cut away with a layer, both as well
    mixed = [name for name, (_, values) in FAMILIES.items() if "layer_types" in values]
    return found + [(name, "narrowed") for name in mixed]


@pytest.mark.parametrize(("name", "cutting"), cases())
def test_macs_and_cache_are_those_of_a_real_pass(name: str, cutting: str) -> None:
    model, structure, _ = cut_model(name, cutting)
    found = cost(model, structure)

    whole, output = counted(model, tokens(SHORT), output_attentions=True)
    # eager attention multiplies the whole square, of which the mask then leaves a part
    masked, token_bytes = 0, 0
    for weights, layer in zip(output.attentions, output.past_key_values.layers, strict=True):
        features = layer.keys.shape[-1] + layer.values.shape[-1]
        masked += int((weights == 0).sum()) * features
        token_bytes += layer.keys.shape[1] * features * layer.keys.element_size()
    assert found["macs_of_sequence"]["64"] == whole - masked
    assert found["cache_bytes_per_token"] == token_bytes

    cache = counted(model, tokens(SHORT - 1))[1].past_key_values
    last, _ = counted(model, tokens(1), past_key_values=cache)
    assert found["macs_per_token"]["64"] == last

    # at length there is no need to compute: the counter reads shapes
    windows = [int((weights[0, 0, -1] > 0).sum()) for weights in output.attentions]
    assert set(windows) <= {SHORT, 5}
    empty: Any = model.to("meta")
    empty.tie_weights()  # which .to("meta") undoes
    empty.config.pad_token_id = None  # GPT-2 looks for it in the tokens, to warn
    whole, output = counted(empty, tokens(LONG).to("meta"), output_attentions=True)
    masked = 0
    for weights, layer, window in zip(
        output.attentions, output.past_key_values.layers, windows, strict=True
    ):
        entries = sum(LONG - (t if window == SHORT else min(t, window)) for t in range(1, LONG + 1))
        features = layer.keys.shape[-1] + layer.values.shape[-1]
        masked += weights.shape[1] * entries * features
    assert found["macs_of_sequence"]["2048"] == whole - masked
    assert cost(empty, structure) == found


def real_parameters(model: Any) -> tuple[int, int]:
    """Numbers, and bytes, of all parameters."""
    each = {id(parameter): parameter for parameter in model.parameters()}.values()
    return sum(p.numel() for p in each), sum(p.numel() * p.element_size() for p in each)


@pytest.mark.parametrize("cutting", ["dense", "cut"])
@pytest.mark.parametrize("name", ["llama-tied", "mistral", "gpt2", "falcon-rw"])
def test_a_checkpoint_is_counted_without_its_weights(
    tmp_path: Path, name: str, cutting: str
) -> None:
    model, structure, layout = cut_model(name, cutting)
    model.bfloat16()
    options = {"config": model.config, "layout": layout.to_dict(), "lineage": [], "card": ""}
    stock = export_checkpoint(model, None, tmp_path / "out", **options)
    assert stock == (cutting == "dense")
    in_memory = cost(model, structure, checkpoint=tmp_path / "out")
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    assert in_memory["checkpoint_bytes"] == weights.stat().st_size
    assert (in_memory["parameters"], in_memory["weight_bytes"]) == real_parameters(model)
    decoder = real_parameters(structure.layers(model))[0]
    assert in_memory["decoder_parameters"] == decoder < in_memory["parameters"]
    assert in_memory["dtype"] == "bfloat16"
    assert json.loads(json.dumps(in_memory)) == in_memory

    weights.unlink()
    found, empty = skeleton(str(tmp_path / "out"))
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert cost(empty, found, checkpoint=tmp_path / "out") == {
        **in_memory,
        "checkpoint_bytes": None,
    }


def test_widths_are_those_of_the_modules() -> None:
    model, structure, _ = cut_model("llama", "cut")
    layers = model.model.layers
    widths = cost(model, structure, lengths=(3,))["widths"]
    assert widths["channel"] == [layer.mlp.up_proj.out_features for layer in layers]
    assert widths["hidden"] == [layer.mlp.up_proj.in_features for layer in layers]
    assert widths["group"] == [layer.self_attn.k_proj.out_features // 8 for layer in layers]
    values = [layer.self_attn.v_proj.out_features for layer in layers]
    assert [g * v for g, v in zip(widths["group"], widths["value"], strict=True)] == values
    assert set(widths) == {"channel", "group", "query", "value", "hidden"}


def test_a_training_model_keeps_its_mode() -> None:
    model, structure, _ = cut_model("llama", "dense")
    model.train()
    model.gradient_checkpointing_enable()  # which would switch the cache off
    assert cost(model, structure)["cache_bytes_per_token"] == 3 * 2 * 2 * 8 * 4
    assert model.training
