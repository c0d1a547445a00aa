"""`inspect`: every number is that of a real model, cut for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_prune.cli.front import main
from lit_prune.cli.inspect import inspect_model
from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint
from lit_prune.structure import Layout, Structure, cut, settle
from tests.structure.tiny import tiny_config, tiny_model
from tests.tiny_fit import uneven

_LENGTH = 12


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Writes a tiny model's config, and nothing else."""

    def write(name: str) -> str:
        tiny_config(name).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def eager_model(name: str, **options: Any) -> Any:
    """A tiny model whose attention is plain matrix products, which can be counted."""
    return tiny_model(name, attn_implementation="eager", **options)


def parameters(model: Any) -> int:
    return sum({id(p): p.numel() for p in model.parameters()}.values())


def macs(model: Any) -> float:
    """Multiply-accumulates of the last of `_LENGTH` tokens, counted while they are done."""
    tokens = torch.full((1, _LENGTH), 5)
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=tokens[:, -1:], past_key_values=cache)
    return counter.get_total_flops() / 2


def cache_bytes(model: Any, tokens: int) -> float:
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, tokens), 5), use_cache=True).past_key_values
    return sum(x.numel() * x.element_size() for y in cache.layers for x in (y.keys, y.values))


def cut_to(model: Any, widths: dict[str, list[int]]) -> bool:
    """Cut to the last units of each axis; returns whether the result is stock."""
    structure = Structure.of(model)
    layout = Layout.full(structure.widths)
    for layer, sizes in enumerate(structure.widths.layers):
        keep = {axis: torch.arange(sizes[axis])[-left[layer] :] for axis, left in widths.items()}
        if "query" in keep:
            keep["query"] = keep["query"].expand(len(keep.get("group", range(sizes["group"]))), -1)
        layout = layout.replace_layer(layer, keep)
    cut(model, structure, layout)
    return settle(model, structure, layout)


@pytest.mark.parametrize(
    ("name", "heads", "stock"),
    [
        ("llama", "none", False),
        ("llama-tied", "group", False),
        ("llama", "query", True),
        ("mistral", "group", True),
        ("gemma2", "none", False),
        ("phi3", "query", False),
        ("gpt2", "none", False),
        ("gpt2", "group", False),
        ("bloom", "none", False),
        ("falcon-new", "query", False),
        ("opt", "none", True),
    ],
)
def test_numbers_are_those_of_a_real_cut(folder: Any, name: str, heads: Any, stock: bool) -> None:
    found = inspect_model(
        folder(name),
        sparsity=0.2,
        axes=["channel"] if heads == "none" else [heads, "channel"],
        stock=stock,
        length=_LENGTH,
        dtype="bfloat16",
    )
    model = eager_model(name, dtype=torch.bfloat16)
    structure = Structure.of(model)
    sizes = {}
    for part in ("totals", "cut"):
        if part == "cut":
            sizes = dict(found["totals"])
            assert cut_to(model, found["cut"]["widths"]) == found["cut"]["stock"]
            assert found["cut"]["stock"] or not stock
        entry = found[part]
        decoder = sum(p.numel() for p in structure.layers(model).parameters())
        assert entry["parameters"] == parameters(model)
        assert entry["decoder_parameters"] == decoder
        assert entry["weight_bytes"] == 2 * parameters(model)
        assert entry["cache_bytes_per_token"] == cache_bytes(model, 4) / 4
        assert entry["cache_bytes"] == cache_bytes(model, _LENGTH)
        # on top of them come the few of the rotary angles
        assert 0 <= macs(model) - entry["macs_per_token"] <= 8
    sparsity = found["cut"]["sparsity"]
    assert sparsity["decoder"] == pytest.approx(
        1 - found["cut"]["decoder_parameters"] / sizes["decoder_parameters"]
    )
    assert sparsity["total"] == pytest.approx(1 - found["cut"]["parameters"] / sizes["parameters"])
    assert abs(sparsity["decoder"] - 0.2) <= 0.02


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "falcon-new"])
def test_one_unit_is_what_goes_with_one_unit(folder: Any, name: str) -> None:
    found = inspect_model(folder(name), length=_LENGTH)
    for entry in found["axes"]:
        if entry["axis"] in ("hidden", "layer"):
            continue
        model = eager_model(name)
        before = parameters(model), macs(model)
        widths = list(entry["units"])
        widths[1] -= 1
        cut_to(model, {entry["axis"]: widths})
        assert before[0] - parameters(model) == entry["unit_parameters"][1]
        assert before[1] - macs(model) == entry["unit_macs"][1]


def test_axes_of_the_whole_model(folder: Any) -> None:
    found = inspect_model(folder("llama-tied"), length=_LENGTH)
    axes = {entry["axis"]: entry for entry in found["axes"]}
    model = eager_model("llama-tied")
    before = parameters(model), macs(model)
    structure = Structure.of(model)
    layout = Layout.full(structure.widths)
    layout = Layout(layout.of, torch.arange(1, structure.widths.shared["hidden"]), layout.layers)
    cut(model, structure, layout)
    settle(model, structure, layout)
    assert axes["hidden"]["units"] == [36]
    assert axes["hidden"]["unit_parameters"] == [before[0] - parameters(model)]
    assert axes["hidden"]["unit_macs"] == [before[1] - macs(model)]
    assert axes["hidden"]["parameters"] == before[0]

    model = eager_model("llama-tied")
    structure = Structure.of(model)
    layout = Layout.full(structure.widths)
    layout = Layout(layout.of, None, layout.layers[1:])
    cut(model, structure, layout)
    settle(model, structure, layout)
    assert axes["layer"]["units"] == [3]
    assert axes["layer"]["unit_parameters"] == [before[0] - parameters(model)] * 3
    assert axes["layer"]["unit_macs"] == [before[1] - macs(model)] * 3
    assert axes["layer"]["parameters"] == found["totals"]["decoder_parameters"]

    # an FFN is nothing but channels here: no biases
    assert axes["channel"]["parameters"] == 3 * 3 * 20 * 36
    share = axes["channel"]["parameters"] / found["totals"]["decoder_parameters"]
    assert axes["channel"]["decoder_share"] == pytest.approx(share)


def test_the_most_is_what_is_refused_above(folder: Any) -> None:
    path = folder("llama")
    most = inspect_model(path, sparsity=0.1)["cut"]["sparsity"]["most"]
    model = eager_model("llama")
    structure = Structure.of(model)
    before = sum(p.numel() for p in structure.layers(model).parameters())
    cut_to(model, {"channel": [1] * 3})
    after = sum(p.numel() for p in structure.layers(model).parameters())
    assert most == pytest.approx(1 - after / before)
    assert inspect_model(path, sparsity=most)["cut"]["widths"] == {"channel": [1] * 3}
    with pytest.raises(UserError, match=rf"the most is {most:.3f}"):
        inspect_model(path, sparsity=most + 0.03)


def test_protected_layers_stay_whole(folder: Any) -> None:
    found = inspect_model(folder("llama"), sparsity=0.1, protected_layers=[1])
    widths = found["cut"]["widths"]["channel"]
    assert widths[1] == 20
    assert widths[0] < 20
    assert not found["cut"]["stock"]


def test_an_export_that_is_not_stock(tmp_path: Path) -> None:
    model = eager_model("llama")
    structure = Structure.of(model)
    layout = uneven(structure, drop_layer=True)
    cut(model, structure, layout)
    assert not settle(model, structure, layout)
    export_checkpoint(
        model,
        None,
        tmp_path / "out",
        config=model.config,
        layout=layout.to_dict(),
        lineage=[],
        card="",
    )
    (tmp_path / "out" / "model.safetensors").unlink()
    found = inspect_model(str(tmp_path / "out"), sparsity=0.2, length=_LENGTH)
    axes = {entry["axis"]: entry for entry in found["axes"]}
    assert axes["channel"]["units"] == [sizes["channel"] for sizes in structure.widths.layers]
    assert axes["group"]["units"] == [1, 2]
    assert axes["group"]["unit_parameters"][0] == axes["group"]["unit_parameters"][1]
    assert found["totals"]["parameters"] == parameters(model)
    assert found["totals"]["macs_per_token"] == pytest.approx(macs(model), abs=8)
    cut_to_widths = found["cut"]["widths"]["channel"]
    cut(model, structure, _channels(structure, cut_to_widths))
    assert found["cut"]["parameters"] == parameters(model)
    assert not found["cut"]["stock"]
    with pytest.raises(UserError, match="the same channel width in every layer under --stock"):
        inspect_model(str(tmp_path / "out"), sparsity=0.2, stock=True)


def _channels(structure: Structure, widths: list[int]) -> Layout:
    layout = Layout.full(structure.widths)
    for layer, width in enumerate(widths):
        layout = layout.replace_layer(layer, {"channel": torch.arange(width)})
    return layout


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gpt2", {"axes": ["query"]}, "axis that gpt2 can cut .channel, group"),
        ("gpt2", {"axes": ["group"], "stock": True}, "'group', .* a field for head_dim"),
        ("bloom", {"stock": True}, "'channel', .* a field for channel"),
        ("llama", {"stock": True, "protected_layers": [1]}, "no protected layers under --stock"),
        ("llama", {"protected_layers": [3]}, "protected layers from 0 to 2, got 3"),
        ("llama", {"sparsity": 1.5}, "sparsity from 0 to below 1, got 1.5"),
        ("llama", {"length": 0}, "length of at least 1, got 0"),
    ],
)
def test_what_can_not_be(folder: Any, name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        inspect_model(folder(name), **{"sparsity": 0.2, **options})


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_dtypes(tmp_path: Path, dtype: Any) -> None:
    tiny_config("llama", dtype=torch.float16).save_pretrained(tmp_path / "half")
    found = inspect_model(str(tmp_path / "half"), dtype=dtype)
    assert found["dtype"] == ("float16" if dtype == "auto" else dtype)
    size = 2 if dtype == "auto" else 4
    assert found["totals"]["weight_bytes"] == size * found["totals"]["parameters"]


def test_json_and_tables(folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder("llama")
    assert main(["inspect", path, "--json", "--sparsity", "0.2", "--length", "12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["macs_per_token"] == pytest.approx(macs(eager_model("llama")), abs=8)
    assert main(["inspect", path, "--sparsity", "0.2", "--length", "12"]) == 0
    out = capsys.readouterr().out
    for number in (
        found["totals"]["parameters"],
        found["cut"]["parameters"],
        found["cut"]["macs_per_token"],
    ):
        assert f"{number:,}" in out
    for width in set(found["cut"]["widths"]["channel"]):
        assert f" {width} " in out
    assert f"removed: {found['cut']['sparsity']['decoder']:.2%}" in out
    assert "up to" in out
    assert main(["inspect", path]) == 0
    assert "after" not in capsys.readouterr().out
