from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.calibration import Calibration
from lit_prune.cutting.decision import apply
from lit_prune.cutting.layerwise import Restoration
from lit_prune.errors import UserError
from lit_prune.masks.adaptation import GATED
from lit_prune.masks.bottleneck import Gates
from lit_prune.masks.folding import check_fold, fold
from lit_prune.masks.gating import attach
from lit_prune.structure import Layout, Structure, cut, settle
from tests.structure.layouts import varied
from tests.structure.tiny import FAMILIES, tiny_model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, use_cache=False).logits


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def built(name: str, axes: Any = GATED, **changes: Any) -> tuple[Any, Structure, Gates, Layout]:
    model: Any = tiny_model(name, **changes)
    structure = Structure.of(model)
    possible = [axis for axis in axes if structure.widths.sizes(0)[axis] > 1]
    gates = Gates(structure.widths, axes, seed=2)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        gates.mu.copy_(1 + 0.5 * torch.randn(len(gates.mu), generator=generator))
    return model, structure, gates, varied(structure, possible)


TIED = ["llama", "gemma2-untied", "phi3", "gpt2", "gpt_neox", "falcon-new", "opt"]
CASES = [
    *((name, axes, {}) for name in FAMILIES for axes in (GATED, ("group", "channel"), ("hidden",))),
    # the other way round than the family's default
    *((name, GATED, {"tie_word_embeddings": name != "gpt2"}) for name in TIED if name != "opt"),
    ("opt", GATED, {"tie_word_embeddings": False}),
    ("gemma2-untied", GATED, {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(
    ("name", "axes", "changes"),
    [case for case in CASES if case[:2] != ("falcon-7b", ("group",))],
    ids=lambda value: str(value) if not isinstance(value, dict) else "changed" * bool(value),
)
def test_the_cut_model_is_the_gated_one(name: str, axes: Any, changes: Any) -> None:
    model, structure, gates, layout = built(name, axes, **changes)
    dense = logits(model)
    with attach(gates, model, structure), gates.holding(layout):
        expected = logits(model)
    assert difference(dense, expected) > 0.05
    fold(model, structure, gates.unpacked(gates.mu, 1.0), layout)
    cut(model, structure, layout)
    settle(model, structure, layout)
    assert difference(logits(model), expected) <= 2e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma2-untied", "phi3"])
def test_so_it_is_where_norms_are_not_rescaled(name: str) -> None:
    model, structure, gates, layout = built(name)
    with attach(gates, model, structure, norm_rescale="none"), gates.holding(layout):
        expected = logits(model)
    fold(model, structure, gates.unpacked(gates.mu, 1.0), layout)
    cut(model, structure, layout, "none")
    settle(model, structure, layout)
    assert difference(logits(model), expected) <= 1e-4  # but for their epsilon


def test_only_what_writes_the_stream_or_reads_a_unit_changes() -> None:
    model, structure, gates, _ = built("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold(model, structure, gates.unpacked(gates.mu, 1.0), Layout.full(structure.widths))
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    layers = [
        f"model.layers.{i}.{m}" for i in range(3) for m in ("self_attn.o_proj", "mlp.down_proj")
    ]
    assert changed == {
        "model.embed_tokens.weight",
        *(f"{path}.{part}" for path in layers for part in ("weight", "bias")),
    }
    mu = gates.split(gates.mu.detach())
    hidden, group = mu["hidden", None], mu["group", 1]
    name = "model.layers.1.self_attn.o_proj"
    columns = group.repeat_interleave(3 * 8)  # three query heads of eight entries
    expected = before[f"{name}.weight"] * hidden[:, None] * columns
    assert torch.allclose(model.state_dict()[f"{name}.weight"], expected, rtol=1e-6)
    assert torch.allclose(model.state_dict()[f"{name}.bias"], before[f"{name}.bias"] * hidden)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-7b"])
def test_groups_and_channels_that_will_go_are_updated_too(name: str) -> None:
    model, structure, gates, layout = built(name, ("group", "channel"))
    with attach(gates, model, structure), gates.holding(Layout.full(structure.widths)):
        expected = logits(model)
    fold(model, structure, gates.unpacked(gates.mu, 1.0), layout)
    assert difference(logits(model), expected) <= 2e-5


@pytest.mark.parametrize("kind", ["least_squares", "bias", "unit_scales"])
def test_nothing_is_made_up_for_where_masks_let_nothing_through(kind: Any) -> None:
    model, structure, gates, layout = built("llama", ["channel"])
    with torch.no_grad():
        for (axis, layer), values in gates.split(gates.mu).items():
            kept = layout.layers[layer or 0].keep[axis]
            values.copy_(torch.zeros_like(values).index_copy(0, kept, values[kept]))
    fold(model, structure, gates.unpacked(gates.mu, 1.0), layout)
    plain = copy.deepcopy(model)
    cut(plain, Structure.of(plain), layout)
    ids = torch.randint(3, 61, (8, 24), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    apply(Calibration(model, structure, [batch], ("channel",)), layout, Restoration(kind))
    expected = dict(plain.named_parameters())
    for key, value in model.named_parameters():
        assert torch.allclose(value, expected[key], atol=1e-5), key


def test_a_tied_head_is_made_up_for_in_the_final_norm() -> None:
    for name in ("llama-tied", "gemma2", "gpt2"):
        model, structure, gates, _ = built(name, ["hidden"])
        paths = {"gpt2": ("transformer.wte", "transformer.ln_f")}
        embedding, norm = paths.get(name, ("model.embed_tokens", "model.norm"))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fold(model, structure, gates.unpacked(gates.mu, 1.0), Layout.full(structure.widths))
        after, mu = model.state_dict(), gates.mu.detach()
        assert model.lm_head.weight is model.get_submodule(embedding).weight
        assert torch.allclose(after[f"{embedding}.weight"], before[f"{embedding}.weight"] * mu)
        offset = 1 if name == "gemma2" else 0
        expected = (before[f"{norm}.weight"] + offset) / mu - offset
        assert torch.allclose(after[f"{norm}.weight"], expected, atol=1e-6)
        if name == "gpt2":
            assert torch.allclose(after[f"{norm}.bias"], before[f"{norm}.bias"] / mu)


def test_removed_units_do_no_harm() -> None:
    model, structure, gates, layout = built("llama-tied")
    with torch.no_grad():
        gates.mu.zero_()
        for (axis, layer), values in gates.split(gates.mu).items():
            kept = layout.hidden if layer is None else layout.layers[layer].keep[axis]
            values[kept] = 0.5
    fold(model, structure, gates.unpacked(gates.mu, 1.0), layout)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_weights_are_rounded_once() -> None:
    _, structure, gates, layout = built("llama")
    exact = tiny_model("llama").bfloat16()
    expected: Any = tiny_model("llama").bfloat16().float()
    fold(exact, structure, gates.unpacked(gates.mu, 1.0), layout)
    fold(expected, structure, gates.unpacked(gates.mu, 1.0), layout)
    name = "model.layers.0.self_attn.o_proj.weight"
    off = exact.state_dict()[name].float() - expected.state_dict()[name]
    assert (off.abs() <= expected.state_dict()[name].abs() * 2**-8 * 1.01).all()


def test_a_tied_head_without_a_final_norm_is_refused() -> None:
    changes = {"do_layer_norm_before": False}
    model, structure, gates, layout = built("opt", **changes)
    with pytest.raises(
        UserError, match="expected a final norm before a head that is tied"
    ) as caught:
        fold(model, structure, gates.unpacked(gates.mu, 1.0), layout)
    assert "\n" not in str(caught.value)
    check_fold(*built("opt")[:2])
    untied = built("opt", tie_word_embeddings=False, **changes)
    check_fold(*untied[:2])
    means = {axis: v for axis, v in gates.unpacked(gates.mu, 1.0).items() if axis != "hidden"}
    fold(model, structure, means, layout)
