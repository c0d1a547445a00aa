"""RMS norms after features of the stream were cut, against their formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.export import export_checkpoint, load_pruned
from lit_prune.structure import LayerUnits, Layout, Structure, cut, settle
from lit_prune.structure.norms import energies, norm_epsilon, set_norm_epsilon, stream_norms
from tests.structure.tiny import FAMILIES, tiny_model

LAYERED = {"gpt2", "gpt_neox", "bloom", "falcon-new", "falcon-7b", "falcon-rw"}
LAYERED |= {"opt", "opt-factorised"}
RMS = [name for name in FAMILIES if name not in LAYERED]
PLUS_ONE = ("gemma2", "gemma2-untied", "gemma3")
KEPT = torch.tensor([0, 3, 4, 5, 7, 8, 11, 12, 13, 17, 19, 20, 22, 23, 25, 29, 30, 31])


def batches(*, padded: str = "") -> list[dict[str, Tensor]]:
    """Two batches of two rows; the second row of each has five tokens of padding."""
    generator = torch.Generator().manual_seed(2)
    result = []
    for _ in range(2):
        ids = torch.randint(3, 61, (2, 9), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, slice(4, None) if padded == "right" else slice(None, 5)] = 0
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


def keeping(structure: Structure, kept: Tensor = KEPT) -> Layout:
    full = Layout.full(structure.widths)
    return Layout(full.of, kept, full.layers)


def read(name: str, **options: Any) -> tuple[Any, Structure]:
    model = tiny_model(name, **options)
    return model, Structure.of(model)


def inputs(model: Any, path: str, batch: dict[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("padded", ["", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_energies_are_sums_of_squares_over_tokens(name: str, padded: str) -> None:
    model, structure = read(name)
    model.train()
    found = energies(model, structure, batches(padded=padded))
    assert model.training
    paths = [site.path for site in stream_norms(model, structure)]
    assert list(found) == paths
    assert len(paths) == 3 * (4 if name == "gemma2" else 2) + 1
    model.eval()
    for path in paths:
        expected = torch.zeros(36, dtype=torch.float64)
        for batch in batches(padded=padded):
            x = inputs(model, path, batch)
            for row in range(2):
                for token in range(9):
                    if batch["attention_mask"][row, token]:
                        expected += x[row, token].double() ** 2
        assert found[path].dtype == torch.float32
        assert torch.allclose(found[path].double(), expected, rtol=1e-5)
    parts = [energies(model, structure, [batch]) for batch in batches(padded=padded)]
    for path in paths:
        assert torch.allclose(parts[0][path] + parts[1][path], found[path])
        assert not model.get_submodule(path)._forward_pre_hooks


def factors(
    mode: str, found: dict[str, Tensor], path: str, tied: bool, scaled: bool, kept: Tensor = KEPT
) -> float:
    """What an effective norm weight is multiplied by."""
    ratio = 36 / len(kept)
    gone = sum(found[path][i].item() for i in range(36) if i not in kept.tolist())
    rho = gone / found[path].sum().item()
    factor = {"masked": ratio, "none": 1.0, "calibrated": (1 - rho) * ratio}[mode] ** 0.5
    return factor / ratio**0.5 if tied and scaled and path == "model.norm" else factor


@pytest.mark.parametrize("mode", ["masked", "none", "calibrated"])
@pytest.mark.parametrize("name", RMS)
def test_weights_and_epsilon_follow_the_mode(name: str, mode: Any) -> None:
    dense, structure = read(name)
    found = energies(dense, structure, batches())
    model, structure = read(name)
    cut(model, structure, keeping(structure), norm_rescale=mode, energies=found)
    offset = 1.0 if name in PLUS_ONE else 0.0
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for site in stream_norms(model, structure):
        old = dense.get_submodule(site.path).weight[KEPT] + offset
        new = model.get_submodule(site.path).weight + offset
        factor = factors(mode, found, site.path, tied, name in PLUS_ONE)
        assert torch.allclose(new, old * factor, rtol=1e-5, atol=1e-6)
    epsilon = dense.config.rms_norm_eps * (1 if mode == "none" else 2)
    assert norm_epsilon(model, structure) == pytest.approx(epsilon)
    assert settle(model, structure, keeping(Structure.of(dense)))
    assert model.config.rms_norm_eps == norm_epsilon(model, structure)
    ids = batches()[0]["input_ids"]
    stream = model.get_input_embeddings()(ids)
    assert torch.allclose(stream, dense.get_input_embeddings()(ids)[..., KEPT], rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_calibrated_norms_compute_what_they_did_if_the_share_is_constant(name: str) -> None:
    path = "model.layers.1.input_layernorm"
    dense, structure = read(name)
    x = torch.randn(7, 36)
    gone = torch.tensor([i for i in range(36) if i not in KEPT.tolist()])
    # a tenth of each token's energy lies in the features that go
    x[:, gone] *= (x[:, KEPT].norm(dim=1) / x[:, gone].norm(dim=1) / 3)[:, None]
    expected = dense.get_submodule(path)(x)[:, KEPT]
    found = dict.fromkeys(energies(dense, structure, batches()), x.square().sum(0))
    model, structure = read(name)
    cut(model, structure, keeping(structure), norm_rescale="calibrated", energies=found)
    assert torch.allclose(model.get_submodule(path)(x[:, KEPT]), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "gemma2-untied"])
def test_logits_of_a_scaled_embedding_without_rescaling(name: str) -> None:
    dense, _ = read(name)
    model, structure = read(name)
    cut(model, structure, keeping(structure), norm_rescale="none")
    x = torch.randn(5, len(KEPT))
    weight = 1 + dense.model.norm.weight[KEPT]
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    expected = normed @ dense.lm_head.weight[:, KEPT].T
    assert torch.allclose(model.lm_head(model.model.norm(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(LAYERED))
def test_layer_norms_stay(name: str) -> None:
    model, structure = read(name)
    assert energies(model, structure, batches()) == {}
    assert norm_epsilon(model, structure) is None
    kept, states = torch.arange(20), []
    for mode in ("masked", "none", "calibrated"):
        model, structure = read(name)
        cut(model, structure, keeping(structure, kept), norm_rescale=mode, energies={})
        set_norm_epsilon(model, structure, 0.5)
        states.append(model.state_dict())
        assert not any(vars(module).get("eps") == 0.5 for module in model.modules())
    for state in states[1:]:
        assert all(torch.equal(state[key], states[0][key]) for key in state)


@pytest.mark.parametrize(
    "modes", [("none",), ("calibrated",), ("none", "masked"), ("masked", "none")], ids="-".join
)
@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize("uniform", [True, False])
def test_reload_is_before_in_each_mode(
    name: str, modes: tuple[Any, ...], uniform: bool, tmp_path: Path
) -> None:
    model, structure = read(name, rms_norm_eps=1e-3)
    joint, epsilon = Layout.full(structure.widths), 1e-3
    for number, mode in zip((30, 24), modes, strict=False):
        layers = [LayerUnits(i) for i in range(3)]
        if not uniform:
            layers[1] = LayerUnits(1, {"channel": torch.arange(number // 3)})
        step = Layout(structure.widths.copy(), torch.arange(number), tuple(layers))
        epsilon *= 1 if mode == "none" else structure.widths.shared["hidden"] / number
        found = energies(model, structure, batches()) if mode == "calibrated" else None
        cut(model, structure, step, mode, found)
        assert settle(model, structure, step) is uniform
        joint = joint.then(step)
    assert norm_epsilon(model, structure) == pytest.approx(epsilon)
    export_checkpoint(
        model,
        None,
        tmp_path / "out",
        config=model.config,
        layout=joint.to_dict(),
        lineage=[],
        card="",
    )
    loaded = load_pruned(tmp_path / "out")
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert norm_epsilon(loaded, Structure.of(loaded)) == norm_epsilon(model, structure)


def test_calibrated_norms_are_nearer_to_the_dense_ones_than_masked() -> None:
    dense, structure = read("qwen3")
    found = energies(dense, structure, batches())
    for site in stream_norms(dense, structure):
        x, distances = inputs(dense, site.path, batches()[0]), []
        expected = dense.get_submodule(site.path)(x)[..., KEPT]
        for mode in ("calibrated", "masked"):
            model, its = read("qwen3")
            cut(model, its, keeping(its), mode, found)
            distances.append((model.get_submodule(site.path)(x[..., KEPT]) - expected).norm())
        assert distances[0] < distances[1]


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("mask", None, "norm_rescale out of masked, none, calibrated, got 'mask'"),
        ("calibrated", lambda e: None, "residual feature at model.norm .* none"),
        ("calibrated", lambda e: {k: v[:20] for k, v in e.items()}, r"got shape \(20,\)"),
        ("calibrated", lambda e: {k: v / 0 for k, v in e.items()}, "finite calibration activ"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_cut(
    mode: Any, change: Any, message: str
) -> None:
    model, structure = read("llama")
    found = energies(model, structure, batches())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layout = keeping(structure).replace_layer(1, {"channel": torch.arange(3)})
    with pytest.raises(UserError, match=message):
        cut(model, structure, layout, mode, change(found) if change else found)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert Structure.of(model).widths == structure.widths


def test_features_without_any_energy_count_as_kept() -> None:
    model, structure = read("llama")
    found = {path: energy * 0 for path, energy in energies(model, structure, batches()).items()}
    twin, its = read("llama")
    cut(model, structure, keeping(structure), "calibrated", found)
    cut(twin, its, keeping(its), "masked")
    assert torch.equal(model.model.norm.weight, twin.model.norm.weight)


def test_energies_are_summed_in_float32_whatever_the_default() -> None:
    model, structure = read("llama")
    expected = energies(model, structure, batches())
    torch.set_default_dtype(torch.bfloat16)  # as a trainer of precision bf16-true has it
    try:
        found = energies(model, structure, batches())
    finally:
        torch.set_default_dtype(torch.float32)
    for path, total in found.items():
        assert total.dtype == torch.float32
        assert torch.equal(total, expected[path])
