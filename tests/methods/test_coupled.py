from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.gradients.lora import LoRA
from lit_prune.methods.coupled import coupled_scores
from lit_prune.methods.smoothing import Smoothing
from lit_prune.methods.unshared import unshared
from lit_prune.structure import Structure
from lit_prune.structure.coupling import names_of, view
from tests import literal_coupled
from tests.planted_components import plant
from tests.structure.tiny import tiny_model

ALL = ("query", "channel", "hidden")


def sentences(number: int = 10, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        ids = torch.randint(3, 61, (1, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found


def literal(model: Any, structure: Structure, data: list[Any], smooth: bool) -> dict[str, Any]:
    """Explicit matrices of each sentence's gradients, equation 7 for each component."""
    series: list[list[dict[str, Tensor]]] = []
    with unshared(model, structure) as own:
        for batch in data:
            model.zero_grad()
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits[0], batch["labels"][0, 1:])
            loss.backward()
            series.append([])
            for layer in range(len(own.widths.layers)):
                named = {name: model.get_parameter(name) for name in names_of(model, own, layer)}
                weights = {name: p.detach() for name, p in named.items()}
                slopes = {name: p.grad for name, p in named.items()}
                rows = [view(model, own, layer, x) for x in (weights, slopes)]  # pyright: ignore[reportArgumentType]
                series[-1].append(literal_coupled.component_scores(rows[0], rows[1]))
    model.zero_grad()

    def joined(values: list[Tensor]) -> Tensor:
        if not smooth:
            return torch.stack(values).mean(0)
        importance = uncertainty = total = torch.zeros_like(values[0])
        for value in values:
            importance = 0.5 * importance + 0.5 * value
            uncertainty = 0.5 * uncertainty + 0.5 * (value - importance).abs()
            total = total + importance * uncertainty
        return total

    found: dict[str, Any] = {"hidden": [joined([sum(x["hidden"] for x in s) for s in series])]}  # pyright: ignore[reportArgumentType]
    for name in ("head", "channel"):
        found[name] = [
            joined([sentence[layer][name] for sentence in series])
            for layer in range(len(structure.widths.layers))
        ]
    return found


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize("smooth", [True, False])
def test_scores_are_those_of_explicit_matrices(name: str, smooth: bool) -> None:
    model = tiny_model(name, dtype=torch.float64, num_hidden_layers=2)
    structure, data = Structure.of(model), sentences(3, 8)
    expected = literal(model, structure, data, smooth)
    sizes = structure.widths.layers[0]
    heads = "query" if sizes["query"] > 1 else "group"
    found = coupled_scores(model, structure, data, (heads, "channel", "hidden"), Smoothing(smooth))
    assert found.keys() == {heads, "channel", "hidden"}
    for layer in range(2):
        row = expected["head"][layer].sum(1)
        if heads == "query":
            row = row.view(sizes["group"], sizes["query"])
        for got, want in ((found[heads], row), (found["channel"], expected["channel"][layer])):
            # PLATON of values in float32
            torch.testing.assert_close(got[layer].double(), want, rtol=1e-4, atol=1e-12)
    assert len(found["hidden"]) == 1
    torch.testing.assert_close(
        found["hidden"][0].double(), expected["hidden"][0], rtol=1e-4, atol=1e-12
    )


def test_a_groups_score_is_the_sum_of_its_heads() -> None:
    model = tiny_model("llama")
    structure, data = Structure.of(model), sentences(2)
    heads = coupled_scores(model, structure, data, ["query"], Smoothing())["query"]
    groups = coupled_scores(model, structure, data, ["group"], Smoothing())["group"]
    for one, other in zip(heads, groups, strict=True):
        torch.testing.assert_close(one.sum(1), other)


def test_each_evaluation_starts_afresh() -> None:
    model, smoothing = tiny_model("llama"), Smoothing()
    structure = Structure.of(model)
    coupled_scores(model, structure, sentences(2, seed=5), ["channel"], smoothing)
    again = coupled_scores(model, structure, sentences(2), ["channel"], smoothing)
    expected = coupled_scores(model, structure, sentences(2), ["channel"], Smoothing())
    for one, other in zip(again["channel"], expected["channel"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("one_sided", [False, True])
def test_planted_units_go_first(seed: int, one_sided: bool) -> None:
    planted = plant(seed, one_sided=one_sided)
    structure = Structure.of(planted.model)
    for smooth in (True, False):
        scores = coupled_scores(planted.model, structure, sentences(), ALL, Smoothing(smooth))
        assert planted.found(scores)
    generator = torch.Generator().manual_seed(seed)
    random = {
        axis: [torch.rand(x.shape, generator=generator) for x in tensors]
        for axis, tensors in scores.items()
    }
    assert not planted.found(random)


@pytest.mark.parametrize("seed", range(2))
def test_lora_gradients_find_them_too(seed: int) -> None:
    planted = plant(seed)
    structure = Structure.of(planted.model)
    scores = coupled_scores(planted.model, structure, sentences(), ALL, Smoothing(), lora=LoRA())
    assert planted.found(scores)
    exact = coupled_scores(planted.model, structure, sentences(), ALL, Smoothing())
    assert not torch.allclose(exact["hidden"][0], scores["hidden"][0], rtol=0.05)


def together(shares: list[list[Any]]) -> list[Any]:
    """Scores of each process, played by threads whose gathering waits for all."""
    barrier, table = threading.Barrier(len(shares)), [torch.empty(0)] * len(shares)
    results: list[Any] = [None] * len(shares)

    def run(rank: int) -> None:
        torch.set_num_threads(1)

        def gather(tensor: Tensor) -> list[Tensor]:
            table[rank] = tensor
            barrier.wait(60)
            found = [x.clone() for x in table]
            barrier.wait(60)
            assert len({x.shape for x in found}) == 1
            return found

        structure, ranks = Structure.of(models[rank]), Ranks(gather=gather)
        results[rank] = coupled_scores(
            models[rank], structure, shares[rank], ALL, Smoothing(), ranks=ranks
        )

    models = [tiny_model("llama") for _ in shares]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("number", [5, 4, 1])
def test_processes_score_as_one_does(number: int) -> None:
    data = sentences(number)
    model = tiny_model("llama")
    alone = coupled_scores(model, Structure.of(model), data, ALL, Smoothing())
    backwards = coupled_scores(model, Structure.of(model), data[::-1], ALL, Smoothing())
    for found in together([data[0::2], data[1::2]]):
        for axis, tensors in alone.items():
            for one, other in zip(tensors, found[axis], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    if number > 1:  # the order counts
        assert not torch.allclose(alone["hidden"][0], backwards["hidden"][0], rtol=1e-3)


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model("llama")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    coupled_scores(model, Structure.of(model), sentences(2), ALL, Smoothing())
    coupled_scores(model, Structure.of(model), sentences(2), ALL, Smoothing(), lora=LoRA())
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None


def test_channels_alone_need_no_copies_of_keys(monkeypatch: Any) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError

    model = tiny_model("llama")
    structure = Structure.of(model)
    whole = coupled_scores(model, structure, sentences(2), ALL, Smoothing())
    monkeypatch.setattr("lit_prune.methods.coupled.unshared", refuse)
    found = coupled_scores(model, structure, sentences(2), ["channel"], Smoothing())
    assert found.keys() == {"channel"}
    for one, other in zip(found["channel"], whole["channel"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0)


def test_gradients_that_are_not_finite_are_refused() -> None:
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output + torch.zeros_like(output) * _Infinite.apply(output)
    )
    with pytest.raises(UserError, match="expected finite gradients, got NaN or infinity in layer"):
        coupled_scores(model, Structure.of(model), sentences(1), ALL, Smoothing())


class _Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        return torch.full_like(gradients[0], float("inf"))
