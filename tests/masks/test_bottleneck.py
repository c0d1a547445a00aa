from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.masks.adaptation import GATED, DecoderCount
from lit_prune.masks.bottleneck import Gates, Objective, mask_optimizer
from lit_prune.structure import Structure, Widths
from lit_prune.structure.counting import count, unique_labels
from tests.structure.tiny import tiny_config

_STRUCTURE, _MODEL = Structure.of_config(tiny_config("llama"))
LABELS, WIDTHS = unique_labels(_MODEL, _STRUCTURE), _STRUCTURE.widths
COUNTED = DecoderCount(LABELS, WIDTHS)
WEIGHTS = {"group": 0.3, "channel": 0.02, "hidden": 0.1}


def spread(seed: int = 0, **options: Any) -> Gates:
    """Gates of which some are open, some closed and some between."""
    gates = Gates(WIDTHS, GATED, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gates.mu.copy_(torch.randn(len(gates.mu), generator=generator))
        gates.log_variance.copy_(torch.randn(len(gates.mu), generator=generator))
    return gates


def literal(gates: Gates, axis: str, layer: int | None) -> list[tuple[float, float]]:
    """Mean and variance of each unit of a place, read from the flat parameters."""
    start = 0
    for place, number in gates.sizes.items():
        if place == (axis, layer):
            mu = gates.mu[start : start + number].tolist()
            variances = gates.log_variance[start : start + number].exp().tolist()
            return list(zip(mu, variances, strict=True))
        start += number
    raise KeyError(axis)


def test_masks_start_nearly_open_and_as_the_seed_says() -> None:
    wide = Widths({"hidden": 4000}, [{"channel": 3000, "group": 500}])
    gates = Gates(wide, GATED, seed=3)
    assert gates.mu.mean().item() == pytest.approx(1, abs=5e-4)
    assert gates.log_variance.mean().item() == pytest.approx(-9, abs=5e-4)
    for parameter in (gates.mu, gates.log_variance):
        assert parameter.std().item() == pytest.approx(0.01, rel=0.05)
    assert not torch.equal(gates.mu - 1, gates.log_variance + 9)
    assert gates.multipliers.tolist() == [0, 0]
    again, other = Gates(wide, GATED, seed=3), Gates(wide, GATED, seed=4)
    assert torch.equal(gates.mu, again.mu)
    assert not torch.equal(gates.mu, other.mu)
    state = torch.random.get_rng_state()
    Gates(wide, GATED)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_there_is_a_mask_for_each_unit_that_may_go() -> None:
    gates = Gates(WIDTHS, ["hidden", "group", "channel"], protected=[1])
    layers = (0, 2)
    assert gates.sizes == {
        **{("group", layer): 2 for layer in layers},
        **{("channel", layer): 20 for layer in layers},
        ("hidden", None): 36,
    }
    assert gates.units() == {"group": 4, "channel": 40, "hidden": 36}
    assert len(gates.mu) == len(gates.log_variance) == 80
    alone = WIDTHS.copy()
    alone.layers[0]["group"] = 1
    assert ("group", 0) not in Gates(alone, ["group"]).sizes
    assert Gates(WIDTHS, ["channel"]).units() == {"channel": 60}


@pytest.mark.parametrize(
    ("axes", "protected", "text"),
    [
        (["query"], [], "axes out of group, channel, hidden, got 'query'"),
        (["channel", "group"], [0, 1, 2], "got none on group and channel"),
        ([], [], "got none on no axis"),
    ],
)
def test_what_cannot_have_masks_is_refused(axes: Any, protected: Any, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        Gates(WIDTHS, axes, protected)
    assert "\n" not in str(caught.value)


def test_values_are_given_by_axis_and_layer() -> None:
    gates = spread(protected=[1])
    found = gates.unpacked(gates.mu, 1.0)
    assert found.keys() == set(GATED)
    for axis, layer in (("group", 0), ("channel", 2), ("hidden", None)):
        values = found[axis][layer or 0].tolist()
        assert values == [mu for mu, _ in literal(gates, axis, layer)]
    for axis in ("group", "channel"):
        assert found[axis][1].tolist() == [1.0] * WIDTHS.layers[1][axis]
    ratios = gates.unpacked(gates.log_alpha(), math.inf)
    assert ratios["channel"][1].isinf().all()
    assert ratios["channel"][0].tolist() == pytest.approx(
        [math.log((mu**2 + 1e-8) / v) for mu, v in literal(gates, "channel", 0)], rel=1e-4
    )
    assert "hidden" not in Gates(WIDTHS, ["channel"]).unpacked(torch.zeros(60), 1.0)


def keeps(gates: Gates, axis: str, layer: int | None) -> list[float]:
    ratios = [math.log((mu**2 + 1e-8) / v) for mu, v in literal(gates, axis, layer)]
    return [1 / (1 + math.exp(-10 * ratio)) for ratio in ratios]


def test_the_expected_sparsity_counts_sums_of_soft_keeps() -> None:
    gates = spread(protected=[1])
    expected = WIDTHS.copy()
    expected.shared["hidden"] = sum(keeps(gates, "hidden", None))
    for axis in ("group", "channel"):
        for layer in (0, 2):
            expected.layers[layer][axis] = sum(keeps(gates, axis, layer))
    share = 1 - count(LABELS, expected, decoder=True) / COUNTED.total
    terms = Objective(COUNTED, WEIGHTS, 0.3, 100)(gates, 50)
    assert terms["sparsity"].item() == pytest.approx(share, rel=1e-5)
    assert 0.3 < share < 0.9
    assert terms["penalty"].item() == 0


def test_open_and_closed_masks_count_whole_units() -> None:
    gates = Gates(WIDTHS, GATED)
    objective = Objective(COUNTED, WEIGHTS, 0.3, 100)
    assert objective(gates, 0)["sparsity"].item() == 0
    with torch.no_grad():
        closed = torch.rand(len(gates.mu)) < 0.4
        gates.log_variance[closed] = 9
    expected = WIDTHS.copy()
    for (axis, layer), mask in gates.split(closed).items():
        place = expected.shared if layer is None else expected.layers[layer]
        place[axis] = int((~mask).sum())
    share = 1 - count(LABELS, expected, decoder=True) / COUNTED.total
    assert objective(gates, 0)["sparsity"].item() == pytest.approx(share, abs=1e-6)


def test_the_loss_terms_in_loops() -> None:
    gates = spread(protected=[1])
    with torch.no_grad():
        gates.multipliers.copy_(torch.tensor([-2.0, 3.0]))
    objective = Objective(COUNTED, WEIGHTS, 0.5, 100)
    kl = sum(
        WEIGHTS[axis] * 0.5 * math.log(1 + mu**2 / variance)
        for axis, layer in gates.sizes
        for mu, variance in literal(gates, axis, layer)
    )
    for step, target in ((0, 0.0), (5, 0.25), (10, 0.5), (70, 0.5)):
        terms = objective(gates, step)
        assert terms["kl"].item() == pytest.approx(kl, rel=1e-5)
        excess = terms["sparsity"].item() - target
        assert terms["penalty"].item() == pytest.approx(-2 * excess + 3 * excess**2, rel=1e-4)


def test_slopes_are_those_of_finite_differences() -> None:
    gates = spread(seed=5)
    for parameter in gates.parameters():
        parameter.data = parameter.data.double()
    with torch.no_grad():
        gates.multipliers.copy_(torch.tensor([-2.0, 3.0]))
    objective = Objective(COUNTED, WEIGHTS, 0.5, 100)

    def loss() -> Tensor:
        terms = objective(gates, 50)
        return terms["kl"] + terms["penalty"]

    loss().backward()
    for parameter in gates.parameters():
        assert parameter.grad is not None
        for unit in range(0, len(parameter), 5):
            values = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[unit] += shift
                    values.append(loss().item())
                    parameter[unit] -= shift
            slope = (values[0] - values[1]) / 2e-6
            assert parameter.grad[unit].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize(("target", "sign"), [(0.9, -1), (0.1, 1)])
def test_multipliers_climb_where_the_target_is_missed(target: float, sign: int) -> None:
    gates = spread()
    objective = Objective(COUNTED, WEIGHTS, target, 100)
    optimizer, _ = mask_optimizer(gates, 0.002, 100)
    shares, linear, quadratic = [], [], []
    for _ in range(30):
        terms = objective(gates, 50)
        optimizer.zero_grad()
        terms["penalty"].backward()
        optimizer.step()
        shares.append(terms["sparsity"].item())
        linear.append(gates.multipliers[0].item())
        quadratic.append(gates.multipliers[1].item())
    assert (shares[0] - target) * sign > 0
    assert abs(shares[-1] - target) < abs(shares[0] - target)  # and the masks follow
    assert all(sign * (b - a) > 0 for a, b in itertools.pairwise(linear))
    assert all(b > a for a, b in itertools.pairwise(quadratic))
    assert abs(linear[0]) == pytest.approx(0.1, rel=1e-3)


def test_the_rate_of_masks_falls_linearly_and_that_of_multipliers_stays() -> None:
    gates = Gates(WIDTHS, GATED)
    optimizer, schedule = mask_optimizer(gates, 0.05, 10, 0.02)
    (own,) = {g["lr"] for g in mask_optimizer(gates, 0.05, 10)[0].param_groups[:2]}
    assert own == 0.05
    (variances,), (means,), _ = (group["params"] for group in optimizer.param_groups)
    assert variances is gates.log_variance
    assert means is gates.mu
    rates = []
    for _ in range(12):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    masks = [max(0.05 * (1 - step / 10), 0) for step in range(12)]
    assert [rate for rate, _, _ in rates] == pytest.approx(masks)
    assert [rate for _, rate, _ in rates] == pytest.approx([0.4 * rate for rate in masks])
    assert {rate for _, _, rate in rates} == {0.1}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0
        assert group["betas"] == (0.9, 0.999)
    assert [group["maximize"] for group in optimizer.param_groups] == [False, False, True]


def test_masks_stay_float32() -> None:
    gates = spread()
    before = {name: value.clone() for name, value in gates.state_dict().items()}
    gates.bfloat16()
    gates.half()
    assert all(torch.equal(value, before[name]) for name, value in gates.state_dict().items())
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = Gates(WIDTHS, GATED)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in made.state_dict().values()} == {torch.float32}
    assert torch.equal(made.mu, Gates(WIDTHS, GATED).mu)


def test_noise_has_a_seed_of_its_own_for_each_rank_batch_and_place() -> None:
    gates, seen = Gates(WIDTHS, GATED), set()
    for rank in range(3):
        for batch in range(3):
            gates.reseed(rank, batch)
            seen |= {gates.noise_seed(number) for number in range(3)}
    assert len(seen) == 27
    other = Gates(WIDTHS, GATED, seed=1)
    other.reseed(2, 2)
    assert other.noise_seed(2) not in seen
    assert all(0 <= seed < 2**63 for seed in seen)


def test_the_best_masks_come_back() -> None:
    gates = spread()
    gates.recall()
    kept = [gates.mu.clone(), gates.log_variance.clone()]
    assert gates.remember(2.0)
    for loss in (2.0, 3.0, math.nan):
        with torch.no_grad():
            gates.mu.add_(1)
            gates.log_variance.sub_(1)
        assert not gates.remember(loss)
    again = Gates(WIDTHS, GATED)
    again.load_state_dict(gates.state_dict())
    for found in (gates, again):
        found.recall()
        assert torch.equal(found.mu, kept[0])
        assert torch.equal(found.log_variance, kept[1])
    assert gates.remember(1.0)
