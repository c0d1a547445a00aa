from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.gradients.folded import weight_gradients
from lit_prune.gradients.lora import Factors, LoRA, lora_gradients
from lit_prune.methods.unshared import unshared
from lit_prune.recovery.lora import attach_lora, lora_parameters
from lit_prune.structure import Structure
from lit_prune.structure.coupling import names_of, view
from tests.structure.tiny import tiny_model

Rows = dict[str, Tensor]
Folded = dict[tuple[int, int], tuple[float, Rows, Rows]]


def batches(number: int = 3, length: int = 10) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(number):
        ids = torch.randint(3, 61, (1, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def folded(function: Any, *args: Any, **options: Any) -> Folded:
    found: Folded = {}

    def fold(batch: int, loss: float, layer: int, weights: Rows, gradients: Rows) -> None:
        copies = [{k: v.clone() for k, v in x.items()} for x in (weights, gradients)]
        found[batch, layer] = (loss, copies[0], copies[1])

    function(*args[:3], fold, *args[3:], **options)
    return found


def orthonormal(monkeypatch: Any) -> None:
    """Make A of orthonormal columns, so that nothing of the gradient is lost."""
    start = Factors.__init__

    def init(self: Factors, *args: Any) -> None:
        start(self, *args)
        with torch.no_grad():
            self.down.copy_(torch.linalg.qr(torch.randn_like(self.down)).Q)

    monkeypatch.setattr(Factors, "__init__", init)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_with_a_full_basis_the_estimate_is_the_gradient(monkeypatch: Any, name: str) -> None:
    orthonormal(monkeypatch)
    model = tiny_model(name, dtype=torch.float64)
    structure, data = Structure.of(model), batches()
    expected = folded(weight_gradients, model, structure, data)
    lora = LoRA(rank=128, alpha=7.0, steps=0)
    found = folded(lora_gradients, model, structure, data, lora)
    assert found.keys() == expected.keys()
    assert len(found) == 3 * 3
    for key, (loss, weights, gradients) in expected.items():
        assert found[key][0] == pytest.approx(loss)
        assert found[key][1].keys() == weights.keys()
        for role in weights:
            torch.testing.assert_close(found[key][1][role], weights[role])
            torch.testing.assert_close(found[key][2][role], gradients[role], atol=1e-9, rtol=1e-5)


def literal(model: Any, structure: Structure, data: list[Any], lora: LoRA) -> Folded:
    """The same with the LoRA layers of peft, and the formula as it is written."""
    model = copy.deepcopy(model)
    layers = range(len(structure.widths.layers))
    names = [name for layer in layers for name in names_of(model, structure, layer)]
    weights = {name: model.get_parameter(name).detach() for name in names}
    kinds = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in names}
    plain = copy.deepcopy(model)
    targets = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    attach_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=targets,
        dtype=torch.float64,
        seed=lora.seed,
    )

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lora.learning_rate)
    for _ in range(lora.steps):
        optimizer.zero_grad()
        torch.stack([loss_of(batch) for batch in data]).mean().backward()
        optimizer.step()
    biases = {
        name: model.get_submodule(name.rpartition(".")[0]).get_base_layer().bias
        for name in names
        if name.endswith(".bias")
    }
    for bias in biases.values():
        bias.requires_grad_(True)
    found: Folded = {}
    for number, batch in enumerate(data):
        model.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        merged, slopes = dict(weights), {name: bias.grad for name, bias in biases.items()}
        for path in targets:
            layer: Any = model.get_submodule(path)
            a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
            s = lora.alpha / lora.rank
            slope = b.grad @ a + b @ a.grad - b.grad @ a.grad
            slope = slope * a.shape[1] / (s * (a**2).sum())
            update = s * b @ a
            if kinds[f"{path}.weight"] is not nn.Linear:  # Conv1D
                slope, update = slope.T, update.T
            merged[f"{path}.weight"] = weights[f"{path}.weight"] + update.detach()
            slopes[f"{path}.weight"] = slope.detach()
        for layer in layers:
            found[number, layer] = (
                float(loss.detach()),
                view(plain, structure, layer, merged),
                view(plain, structure, layer, slopes),
            )
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_formula_on_layers_of_peft(name: str) -> None:
    model = tiny_model(name, dtype=torch.float64)
    structure, data = Structure.of(model), batches()
    lora = LoRA(rank=4, alpha=6.0, steps=5, learning_rate=1e-2, seed=5)
    expected = literal(model, structure, data, lora)
    found = folded(lora_gradients, model, structure, data, lora)
    assert found.keys() == expected.keys()
    for key, (loss, weights, gradients) in expected.items():
        assert found[key][0] == pytest.approx(loss, rel=1e-5)
        for role in weights:
            # RMS norms compute in float32, and AdamW's first steps are the gradient's signs
            torch.testing.assert_close(found[key][1][role], weights[role], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(found[key][2][role], gradients[role], atol=1e-4, rtol=1e-2)


def test_the_mean_over_bases_is_the_gradient() -> None:
    linear = nn.Linear(12, 5, dtype=torch.float64)
    truth = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros(5, 12, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2000):
        factors = Factors(linear, 4, 2.5, generator)
        # at B = 0 the chain rule gives these
        total += factors.estimate(
            torch.zeros_like(factors.down), 2.5 * truth @ factors.down.detach().T
        )
    assert float((total / 2000 - truth).norm() / truth.norm()) < 0.06


def everything(model: nn.Module) -> tuple[Any, ...]:
    return (
        {key: (p, p.requires_grad, p.grad) for key, p in model.named_parameters()},
        {key: type(m) for key, m in model.named_modules()},
        {key: (m.training, len(m._forward_hooks)) for key, m in model.named_modules()},
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny_model("llama")
    model.train()
    model.get_submodule("model.layers.1").eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        if number % 3 == 0:
            parameter.grad = torch.randn_like(parameter)
    values = {key: p.detach().clone() for key, p in model.named_parameters()}
    slopes = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    before, random = everything(model), torch.get_rng_state()

    def fold(*args: Any) -> None:
        if fails:
            raise KeyError

    try:
        lora_gradients(model, Structure.of(model), batches(), fold, LoRA(learning_rate=0.1))
        assert not fails
    except KeyError:
        assert fails
    after = everything(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for key, (parameter, required, gradient) in after[0].items():
        assert parameter is before[0][key][0]
        assert (required, gradient is None) == (before[0][key][1], key not in slopes)
        assert torch.equal(parameter, values[key])
        assert gradient is None or torch.equal(gradient, slopes[key])
    assert torch.equal(torch.get_rng_state(), random)


def test_one_seed_one_result_and_training_counts() -> None:
    model = tiny_model("llama")
    structure, data = Structure.of(model), batches()

    def run(**options: Any) -> Tensor:
        return folded(lora_gradients, model, structure, data, LoRA(**options))[1, 2][2]["down"]

    assert torch.equal(run(), run())
    assert not torch.allclose(run(), run(seed=1), rtol=1e-2)
    assert not torch.equal(run(), run(steps=4))


def test_processes_train_the_same_factors() -> None:
    """Two processes with the same batches, played by a sum that doubles."""
    model = tiny_model("llama")
    structure, data, lora = Structure.of(model), batches(2), LoRA(learning_rate=1e-2)
    expected = folded(lora_gradients, model, structure, data * 2, lora)
    found = folded(lora_gradients, model, structure, data, lora, reduce=lambda tensor: tensor * 2)
    for key, (_, weights, _) in found.items():
        for role, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key][1][role], atol=1e-4, rtol=1e-3)


def test_a_process_without_batches_trains_with_the_others() -> None:
    model = tiny_model("llama")
    sums: list[Tensor] = []

    def reduce(tensor: Tensor) -> Tensor:
        sums.append(tensor)
        return tensor + 1

    lora_gradients(model, Structure.of(model), [], lambda *args: None, LoRA(), reduce=reduce)
    assert len(sums) == 1 + 5


def test_it_works_on_heads_that_share_no_keys() -> None:
    model = tiny_model("llama")
    structure, data = Structure.of(model), batches(2)
    with unshared(model, structure) as own:
        found = folded(lora_gradients, model, own, data, LoRA())
    _, weights, gradients = found[1, 0]
    for role in ("key", "value"):
        assert weights[role].shape == gradients[role].shape == (6, 8, 37)
        assert not torch.allclose(gradients[role][0], gradients[role][1], rtol=1e-2)


def test_weights_of_half_precision_get_factors_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = folded(lora_gradients, model, Structure.of(model), batches(1), LoRA())
    for _, weights, gradients in found.values():
        assert weights["down"].dtype == gradients["down"].dtype == torch.float32
        assert gradients["down"].isfinite().all()


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"alpha": 0.0}, {"steps": -1}, {"learning_rate": float("nan")}]
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected LoRA gradients of rank >= 1"):
        LoRA(**options)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3] = float("nan")
    with pytest.raises(UserError, match="a finite loss"):
        lora_gradients(model, Structure.of(model), batches(1), lambda *args: None, LoRA())
