from __future__ import annotations

import math

import pytest
import torch

from lit_prune.scores import vib


def masks(seed: int = 0, units: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(units, generator=generator, dtype=torch.float64)
    return mu, 4 * torch.randn(units, generator=generator, dtype=torch.float64) - 2


def test_formulas_entry_by_entry() -> None:
    mu, log_variance = masks()
    ratios = vib.log_alpha(mu, log_variance)
    divergences, keeps = vib.kl_divergence(mu, log_variance), vib.soft_keep(ratios)
    for j in range(len(mu)):
        m, variance = mu[j].item(), math.exp(log_variance[j].item())
        assert ratios[j].item() == pytest.approx(math.log((m**2 + 1e-8) / variance), rel=1e-12)
        assert divergences[j].item() == pytest.approx(0.5 * math.log(1 + m**2 / variance))
        expected = 1 / (1 + math.exp(-10 * ratios[j].item()))
        assert keeps[j].item() == pytest.approx(expected, rel=1e-12)


def test_a_mean_of_zero_is_finite() -> None:
    mu = torch.zeros(1, requires_grad=True)
    log_variance = torch.full((1,), -9.0, requires_grad=True)
    for function in (vib.log_alpha, vib.kl_divergence):
        value = function(mu, log_variance)
        slopes = torch.autograd.grad(value.sum(), [mu, log_variance])
        assert all(tensor.isfinite().all() for tensor in (value, *slopes))
    assert vib.log_alpha(mu, log_variance).item() == pytest.approx(math.log(1e-8) + 9)


def test_the_first_masks_let_nearly_everything_through() -> None:
    one, low = torch.tensor(1.0), torch.tensor(-9.0)
    assert vib.log_alpha(one, low).item() == pytest.approx(9)
    assert vib.soft_keep(vib.log_alpha(one, low)).item() == 1.0
    assert vib.kl_divergence(one, low).item() == pytest.approx(4.5, abs=1e-3)
    assert vib.soft_keep(torch.tensor(0.0)).item() == 0.5


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_the_penalty_and_its_slopes(sparsity: float) -> None:
    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (sparsity, -2, 3)]
    penalty = vib.sparsity_penalty(values[0], 0.3, values[1], values[2])
    excess = sparsity - 0.3
    assert penalty.item() == pytest.approx(-2 * excess + 3 * excess**2)
    slopes = torch.autograd.grad(penalty, values)
    found = [slope.item() for slope in slopes]
    assert found == pytest.approx([-2 + 6 * excess, excess, excess**2])


@pytest.mark.parametrize(("target", "factor"), [(0.2, 1), (0.6, 1), (0.6 + 1e-12, 1), (0.61, 2)])
def test_every_axis_weighs_in_all_what_it_weighs_in_llama_7b(target: float, factor: int) -> None:
    units = {"group": 90, "channel": 30 * 1536, "hidden": 576}
    weights = vib.kl_weights(units, 30, target)
    start = vib.kl_divergence(torch.tensor(1.0), torch.tensor(-9.0)).item()
    sums = {axis: weights[axis] * number * start for axis, number in units.items()}
    expected = {"group": 1.18 * factor, "channel": 1.59, "hidden": 1.73}
    assert sums == pytest.approx(expected, abs=0.005)
    seven = {"group": 1024, "channel": 32 * 11008, "hidden": 4096}
    assert vib.kl_weights(seven, 32, target) == pytest.approx(
        vib.kl_weights(seven, 32, target, 1.0)
    )


def test_a_number_scales_the_weights_of_the_paper() -> None:
    units = {"group": 9, "channel": 5, "hidden": 7}
    assert vib.kl_weights(units, 12, 0.5, 1.0) == pytest.approx(
        {"group": 256e-6, "channel": 1e-6, "hidden": 54e-6}
    )
    assert vib.kl_weights(units, 12, 0.7, 10.0) == pytest.approx(
        {"group": 5120e-6, "channel": 1e-5, "hidden": 54e-5}
    )
    assert vib.kl_weights({"channel": 5}, 12, 0.5, 1.0).keys() == {"channel"}


def test_the_target_rises_from_zero_and_stays() -> None:
    assert [vib.target_at(step, 100, 0.5) for step in (0, 5, 10, 11, 99)] == pytest.approx(
        [0, 0.25, 0.5, 0.5, 0.5]
    )
    assert [vib.target_at(step, 100, 0.8) for step in (0, 5, 10, 20, 99)] == pytest.approx(
        [0, 0.2, 0.4, 0.8, 0.8]
    )
    assert vib.target_at(0, 0, 0.5) == 0.5


def test_higher_targets_have_a_higher_rate() -> None:
    rates = [vib.default_rate(target) for target in (0.2, 0.5, 0.5 + 1e-12, 0.51)]
    assert rates == [0.05, 0.05, 0.05, 0.1]
