"""Which cuts a family's stock config can express, and what happens to the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint, load_pruned
from lit_prune.structure import AXES, LayerUnits, Layout, Structure, cut, settle
from lit_prune.structure.configs import kept_layers_config, propose
from lit_prune.structure.limits import require_stock
from tests.structure.layouts import cuttable, uniform, varied
from tests.structure.tiny import FAMILIES, tiny_config, tiny_model

_NONE, _STOCK, _FILE, _HOOK = "-", "stock", "modelling file", "hook (ALiBi)"
_UNIFORM = "stock if uniform"
_COPY = "stock if uniform, else config copy per layer"
_DIVISIBLE = "stock if divisible by the heads"
_PADDED = "hook (padded)"
#: Family -> result for channel, group, query, value, hidden, layer: the table of the README.
TABLE: dict[str, tuple[str, ...]] = {
    "llama": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _DIVISIBLE, _STOCK),
    "llama-tied": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _DIVISIBLE, _STOCK),
    "mistral": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _STOCK, _STOCK),
    "qwen2": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _STOCK, _STOCK),
    "qwen3": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _STOCK, _STOCK),
    "gemma2": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _DIVISIBLE, _STOCK),
    "gemma2-untied": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _DIVISIBLE, _STOCK),
    "gemma3": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _DIVISIBLE, _STOCK),
    "phi3": (_UNIFORM, _COPY, _COPY, _PADDED, _STOCK, _STOCK),
    "glm": (_UNIFORM, _UNIFORM, _UNIFORM, _PADDED, _STOCK, _STOCK),
    "gpt2": (_UNIFORM, _FILE, _NONE, _PADDED, _FILE, _STOCK),
    "gpt_neox": (_UNIFORM, _FILE, _NONE, _NONE, _FILE, _STOCK),
    "bloom": (_FILE, _HOOK, _NONE, _NONE, _FILE, _STOCK),
    "falcon-new": (_UNIFORM, _FILE, _FILE, _NONE, _FILE, _STOCK),
    "falcon-7b": (_UNIFORM, _NONE, _FILE, _NONE, _FILE, _STOCK),
    "falcon-rw": (_UNIFORM, _HOOK, _NONE, _NONE, _FILE, _STOCK),
    "opt": (_UNIFORM, _FILE, _NONE, _PADDED, _FILE, _STOCK),
    "opt-factorised": (_UNIFORM, _FILE, _NONE, _PADDED, _FILE, _STOCK),
}
#: Result -> whether it is stock with the same number in each layer (for hidden: a multiple of the
#: heads), and with others.
EXPECTED = {
    _STOCK: (True, True),
    _UNIFORM: (True, False),
    _COPY: (True, False),
    _DIVISIBLE: (True, False),
    _FILE: (False, False),
    _HOOK: (False, False),
    _PADDED: (False, False),
}
CASES = [
    (name, axis, result)
    for name, row in TABLE.items()
    for axis, result in zip(AXES, row, strict=True)
]


def settled(
    name: str, make: Callable[[Structure], Layout], **changes: Any
) -> tuple[Any, Layout, bool]:
    model = tiny_model(name, **changes)
    structure = Structure.of(model)
    layout = make(structure)
    cut(model, structure, layout)
    return model, layout, settle(model, structure, layout)


def keep_features(number: int) -> Callable[[Structure], Layout]:
    def make(structure: Structure) -> Layout:
        full = Layout.full(structure.widths)
        return Layout(full.of, torch.arange(number), full.layers)

    return make


def own_configs(model: Any) -> int:
    configs = [vars(module).get("config", model.config) for module in model.modules()]
    return sum(config is not model.config for config in configs)


def test_the_table_has_every_family_and_axis() -> None:
    assert TABLE.keys() == FAMILIES.keys()
    assert all(len(row) == len(AXES) for row in TABLE.values())


@pytest.mark.parametrize(("name", "axis", "result"), CASES, ids=[f"{n}-{a}" for n, a, _ in CASES])
def test_what_is_stock(name: str, axis: str, result: str) -> None:
    if result == _NONE:
        assert axis not in cuttable(Structure.of(tiny_model(name)))
        return
    makes = [lambda s: uniform(s, [axis]), lambda s: varied(s, [axis])]
    if axis == "hidden":
        makes = [keep_features(24), keep_features(27)]
    models = [settled(name, make) for make in makes]
    assert tuple(stock for _, _, stock in models) == EXPECTED[result]
    for model, _, stock in models:
        hooked = [m for m in model.modules() if hasattr(m, "lit_prune_heads")]
        assert len(hooked) == (3 if result == _HOOK else 0)
        padded = [m for m in model.modules() if hasattr(m, "lit_prune_values")]
        assert len(padded) == (3 if result == _PADDED else 0)
        # layer 1 of three keeps another number than layers 0 and 2, or the config says all
        assert (own_configs(model) > 0) == (result == _COPY and not stock)


@pytest.mark.parametrize(
    ("name", "keep", "hidden"),
    [
        ("gpt2", {"group": torch.tensor([0, 1, 3])}, 24),
        ("gpt_neox", {"group": torch.tensor([0, 1, 3])}, 24),
        ("opt", {"group": torch.tensor([0, 1, 3])}, 24),
        ("opt-factorised", {"group": torch.tensor([0, 1, 3])}, 24),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_and_stream_cut_alike_keep_the_head_dim(name: str, keep: Any, hidden: int) -> None:
    def make(structure: Structure) -> Layout:
        layers = tuple(LayerUnits(i, keep) for i in range(3))
        return Layout(structure.widths.copy(), torch.arange(hidden), layers)

    model, _, stock = settled(name, make)
    assert stock
    assert (model.config.hidden_size, model.config.num_attention_heads) == (24, 3)


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("llama", "channel"),
        ("bloom", "group"),
        ("falcon-rw", "group"),
        ("llama", "value"),
        ("gemma3", "value"),
        ("gpt2", "value"),
        ("opt", "value"),
        ("phi3", "query"),
        ("phi3", "all"),
        ("gpt2", "hidden"),
        ("gemma3", "layer"),
        ("gemma2", "hidden"),
        ("opt", "all"),
        ("qwen3", "all"),
    ],
)
def test_a_checkpoint_has_the_logits_of_the_model_in_memory(
    name: str, axis: str, tmp_path: Path
) -> None:
    model, layout, stock = settled(
        name, lambda s: varied(s, cuttable(s) if axis == "all" else [axis])
    )
    written = export_checkpoint(
        model,
        None,
        tmp_path / "out",
        config=model.config,
        layout=layout.to_dict(),
        lineage=[],
        card="",
    )
    assert written == stock
    read = load_pruned(tmp_path / "out")
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids).logits, model(input_ids=ids).logits)
    if not stock:
        again = Structure.of(read)
        assert again.widths == layout.widths()


@pytest.mark.parametrize("steps", [(30, 24), (33, 30, 27, 24), (35, 34, 33, 32, 30)])
def test_one_features_cut_after_the_other_are_stock_too(steps: tuple[int, ...]) -> None:
    # mistral has no rule on the hidden size; every step rounds the epsilon
    model: Any = tiny_model("mistral", rms_norm_eps=1e-5)
    structure = Structure.of(model)
    for number in steps:
        layout = keep_features(number)(structure)
        cut(model, structure, layout)
        assert settle(model, structure, layout)
    assert model.config.rms_norm_eps == pytest.approx(1e-5 * 36 / steps[-1])


@pytest.mark.parametrize("name", ["glm", "phi3", "llama", "gemma2"])
def test_the_epsilon_of_norms_is_that_of_the_config_to_the_bit(name: str) -> None:
    for number in (6, 12, 18, 24, 30):
        _, _, stock = settled(name, keep_features(number), rms_norm_eps=1e-5)
        assert stock


@pytest.mark.parametrize(("name", "axis", "result"), CASES, ids=[f"{n}-{a}" for n, a, _ in CASES])
def test_what_stock_refuses_is_what_no_config_expresses(name: str, axis: str, result: str) -> None:
    structure = Structure.of(tiny_model(name))
    if result == _NONE or axis in {"hidden", "layer"}:
        return
    options = (structure.family, structure.widths, [axis])
    if EXPECTED[result][0]:
        require_stock(name, *options)
        return
    with pytest.raises(UserError, match=f"config of {name} can express, got '{axis}'"):
        require_stock(name, *options)


def test_lists_with_an_entry_a_layer_follow_the_layers() -> None:
    config = tiny_config("gemma3")
    left = kept_layers_config(config, [0, 1])
    assert left.layer_types == ["sliding_attention", "full_attention"]
    assert left.num_hidden_layers == 2
    assert config.num_hidden_layers == 3
    assert kept_layers_config(config, [1, 2]).layer_types == ["full_attention", "sliding_attention"]


def test_nothing_is_proposed_for_what_no_field_says() -> None:
    structure = Structure.of(tiny_model("llama"))
    config = tiny_config("llama")
    widths = structure.widths.copy()
    assert propose(config, structure.family, widths) is not None
    widths.layers[1]["channel"] -= 1
    assert propose(config, structure.family, widths) is None
    for sizes in widths.layers:
        sizes["channel"], sizes["value"] = 20, 7
    assert propose(config, structure.family, widths) is None
    widths.layers.clear()
    assert propose(config, structure.family, widths) is None
