from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.masks.adaptation import GATED, DecoderCount
from lit_prune.masks.bottleneck import Gates, Objective, mask_optimizer
from lit_prune.masks.folding import fold
from lit_prune.masks.masking import Adaptation, MaskTraining, loss_on
from lit_prune.recovery.distillation import cross_entropy
from lit_prune.scores import vib
from lit_prune.structure import Layout, Structure, cut, settle
from lit_prune.structure.counting import unique_labels
from tests.structure.tiny import tiny_model

STEPS = 150


def training_of(
    model: Any, target: float, seed: int = 0, axes: Any = GATED, **adaptation: Any
) -> MaskTraining:
    structure = Structure.of(model)
    gates = Gates(structure.widths, axes, seed=seed)
    counted = DecoderCount(unique_labels(model, structure), structure.widths)
    weights = vib.kl_weights(gates.units(), len(structure.widths.layers), target)
    objective = Objective(counted, weights, target, STEPS)
    return MaskTraining(model, structure, gates, objective, Adaptation(**adaptation))


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    """Two batches of which one is padded, with other numbers of tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, length in ((2, 9), (1, 14)):
        ids = torch.randint(3, 61, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 3 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


# --- a planted case --------------------------------------------------------------------------


def planted(seed: int) -> tuple[Any, dict[str, list[set[int]]]]:
    """A model of which some units, at random positions, write 0.001 to 0.01 of what others do."""
    model: Any = tiny_model(
        "llama",
        seed=seed,
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        attention_bias=False,
        mlp_bias=False,
        num_hidden_layers=2,
    )
    structure = Structure.of(model)
    generator = torch.Generator().manual_seed(seed + 100)
    means: dict[str, list[Tensor]] = {}
    weak: dict[str, list[set[int]]] = {}
    # the later a layer, the less its units count in the stream, unless they are larger
    strong = {"group": [1.0, 1.5], "channel": [3.0, 5.0], "hidden": [1.0]}
    for axis, numbers in {"group": (1, 1), "channel": (5, 6), "hidden": (6,)}.items():
        size = structure.widths.sizes(0)[axis]
        for number, scale in zip(numbers, strong[axis], strict=True):
            units = torch.randperm(size, generator=generator)[:number]
            values = torch.full((size,), scale)
            values[units] = torch.linspace(0.001, 0.01, number)
            means.setdefault(axis, []).append(values)
            weak.setdefault(axis, []).append(set(units.tolist()))
    fold(model, structure, means, Layout.full(structure.widths))
    return model, weak


def share(training: MaskTraining, weak: dict[str, list[set[int]]]) -> float:
    kept = training.objective.counted.full()
    for axis, sets in weak.items():
        gone = torch.tensor([float(len(units)) for units in sets])
        kept[axis] = kept[axis] - (gone[0] if axis == "hidden" else gone)
    return float(training.objective.counted.sparsity(kept))


def removed(layout: Layout) -> dict[str, list[set[int]]]:
    def gone(size: int, keep: Tensor | None) -> set[int]:
        return set() if keep is None else set(range(size)) - set(keep.tolist())

    found = {
        axis: [
            gone(layout.of.layers[unit.source][axis], unit.keep.get(axis)) for unit in layout.layers
        ]
        for axis in ("group", "channel")
    }
    return {**found, "hidden": [gone(layout.of.shared["hidden"], layout.hidden)]}


def train(training: MaskTraining, dense: Any, seed: int) -> None:
    """Train the masks on random tokens towards what the dense model says of them."""
    gates = training.gates
    for axis in training.objective.weights:  # so that the small model's loss counts more
        training.objective.weights[axis] /= 2
    optimizer, schedule = mask_optimizer(gates, 0.15, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        ids = torch.randint(3, 61, (8, 16), generator=generator)
        with torch.no_grad():
            wanted = dense(input_ids=ids, use_cache=False).logits.softmax(-1)
        gates.reseed(0, step)
        found = training.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        terms = training.objective(gates, step)
        optimizer.zero_grad()
        (-(wanted * found).sum(-1).mean() + terms["kl"] + terms["penalty"]).backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("seed", range(3))
def test_planted_units_go_first(seed: int) -> None:
    model, weak = planted(seed)
    dense = copy.deepcopy(model)
    target = share(training_of(copy.deepcopy(model), 0.1), weak)
    assert 0.3 < target < 0.5
    training = training_of(model, target, seed, multiple=0)
    train(training, dense, seed)
    assert removed(training.decide().layout) == weak
    sparsity = training.objective(training.gates, STEPS)["sparsity"].item()
    assert sparsity == pytest.approx(target, abs=0.06)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name))


@pytest.mark.parametrize("seed", range(3))
def test_random_masks_miss_them(seed: int) -> None:
    model, weak = planted(seed)
    training = training_of(model, 0.4, multiple=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        training.gates.mu.copy_(torch.randn(len(training.gates.mu), generator=generator))
    assert removed(training.decide().layout) != weak


# --- the parts -------------------------------------------------------------------------------


def test_weights_are_frozen_meanwhile() -> None:
    model: Any = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    training = training_of(model, 0.2)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in training.gates.parameters())
    training.close()
    free = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert free == {"model.embed_tokens.weight"}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_end_well_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match=r"can reach, got 0\.99"):
        training_of(tiny_model("llama"), 0.99)
    tied: dict[str, Any] = {"do_layer_norm_before": False}
    with pytest.raises(UserError, match="a final norm before a head that is tied"):
        training_of(tiny_model("opt", **tied), 0.2)
    model = tiny_model("opt", **tied)
    training_of(model, 0.2, weight_update=False).close()
    assert all(p.requires_grad for p in model.parameters())


def test_the_mean_is_over_tokens_of_all_processes() -> None:
    model: Any = tiny_model("llama")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches():
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits.log_softmax(-1)
            for row, labels in enumerate(batch["labels"].tolist()):
                for place, label in enumerate(labels[1:]):
                    if label != -100:
                        total -= logits[row, place, label].item()
                        tokens += 1
        assert tokens == 5 + 8 + 10
        assert loss_on(model, batches(), Ranks()) == pytest.approx(total / tokens, rel=1e-5)
        both = Ranks(reduce=lambda t: t + torch.tensor([10.0, 2.0]))  # another process' sums
        expected = (total + 10) / (tokens + 2)
        assert loss_on(model, batches(), both) == pytest.approx(expected, rel=1e-5)
        unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches()]
        assert loss_on(model, unlabelled, Ranks()) == loss_on(model, batches(), Ranks())


@pytest.mark.parametrize("weight_update", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_masks_are_compared_by_the_model_that_they_leave(name: str, weight_update: bool) -> None:
    model: Any = tiny_model(name)
    how: dict[str, Any] = {"multiple": 8, "weight_update": weight_update}
    training = training_of(model, 0.4, **how)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        training.gates.mu.copy_(1 + 0.4 * torch.randn(len(training.gates.mu), generator=generator))
    found = training.compare(batches(), Ranks())
    assert float(training.gates.best_loss) == pytest.approx(found)
    with torch.no_grad():
        training.gates.mu.fill_(0.5)
        kept = training.gates.best[0].clone()
    training.gates.best_loss.fill_(0.0)
    training.compare(batches(), Ranks())
    assert torch.equal(training.gates.best[0], kept)
    training.gates.best_loss.fill_(found)
    training.gates.recall()

    layout = training.decide().layout
    training.fold(layout)
    training.close()
    structure = training.structure
    cut(model, structure, layout)
    settle(model, structure, layout)
    with torch.no_grad():
        assert loss_on(model, batches(), Ranks()) == pytest.approx(found, rel=1e-4)
        assert cross_entropy(
            model(input_ids=batches()[0]["input_ids"]).logits, batches()[0]["labels"]
        ).isfinite()


def test_masks_are_compared_near_the_target_only() -> None:
    training = training_of(tiny_model("llama"), 0.4)
    gates, structure = training.gates, training.structure
    assert not training.is_near(Ranks())
    with torch.no_grad():  # all open but channels of one layer, so that the sparsity is known
        gates.split(gates.log_variance)["channel", 1][:10] = 20
    sparsity = training.objective(gates, 0)["sparsity"].item()
    assert structure.widths.layers[1]["channel"] == 20
    assert 0.04 < sparsity < 0.06
    for excess, near in ((-0.009, False), (-0.007, True), (0.0009, True), (0.0011, False)):
        training.objective.target = sparsity - excess
        assert training.is_near(Ranks()) == near
        # the first process decides, whatever a float here says
        other = Ranks(agree=lambda own: {name: ~value for name, value in own.items()})
        assert training.is_near(other) != near


def test_every_process_tries_the_layout_of_the_first() -> None:
    training, tried = training_of(tiny_model("llama"), 0.4), []
    whole = Layout.full(training.structure.widths)
    other = Ranks(agree=lambda own: tried.append(own) or {})
    found = training.compare(batches(), other)
    assert tried[0], "this process would try to cut something"
    with torch.no_grad(), training.gates.holding(whole, weighted=True):
        assert found == pytest.approx(loss_on(training.model, batches(), Ranks()))


def test_multiples_that_undo_the_pruning_are_refused_before_masks_train() -> None:
    options: dict[str, Any] = {"axes": ("channel", "hidden"), "multiple": 128}
    with pytest.raises(UserError, match=r"in multiples of 128 can reach, got 0.2, of which 0.000"):
        training_of(tiny_model("llama"), 0.2, **options)
    training_of(tiny_model("llama"), 0.2, **{**options, "multiple": 0})
    training_of(tiny_model("llama"), 0.2, **{**options, "threshold": "zero"})
