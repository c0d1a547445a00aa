from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_prune.scores.taylor import (
    BY_ENTRY,
    ESTIMATES,
    Estimate,
    TaylorSums,
    contribution,
    row_scores,
    unit_scores,
)

ROWS = {
    "query": (2, 3, 4),
    "key": (2, 4),
    "value": (2, 4),
    "output": (2, 3, 4),
    "gate": (5,),
    "up": (5,),
    "down": (5,),
}


def rows_of(seed: int, entries: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    last = () if entries is None else (entries,)
    return {role: torch.randn(*shape, *last, generator=generator) for role, shape in ROWS.items()}


def literal_row(estimate: str, samples: list[list[float]], scale: float) -> float:
    """The estimate of one row, entry by entry."""
    count = len(samples)
    mean = sum(sum(row) for row in samples) / count
    squares = scale * sum(sum(row) ** 2 for row in samples) / count
    columns = list(zip(*samples, strict=True))
    firsts = [sum(column) / count for column in columns]
    seconds = [scale * sum(t * t for t in column) / count for column in columns]
    return {
        "vector": abs(mean),
        "coarse": abs(mean - squares / 2),
        "element1": sum(abs(t) for t in firsts),
        "element2": sum(t / 2 for t in seconds),
        "mixed": sum(abs(a - b / 2) for a, b in zip(firsts, seconds, strict=True)),
    }[estimate]


@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_averages_of_contributions_are_the_formulas(estimate: Estimate, scale: float) -> None:
    samples = [rows_of(seed, 6)["query"] * 0.4 + 0.1 for seed in range(3)]
    mean = torch.stack([contribution(estimate, x, scale) for x in samples]).mean(0)
    assert mean.shape == ((2, 3, 4, 6) if estimate in BY_ENTRY else (2, 3, 4))
    found = row_scores(estimate, mean)
    for place in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        expected = literal_row(estimate, [x[place].tolist() for x in samples], scale)
        assert float(found[place]) == pytest.approx(expected, rel=1e-5)


def test_contributions_leave_the_products_as_they_are() -> None:
    products = rows_of(0, 6)["up"]
    before = products.clone()
    for estimate in ESTIMATES:
        contribution(estimate, products, 3.0)
    assert torch.equal(products, before)


@pytest.mark.parametrize("reduction", ["sum", "max"])
@pytest.mark.parametrize("gate", [True, False])
def test_units_join_the_rows_that_they_own(reduction: Any, gate: bool) -> None:
    rows = {role: x.abs() for role, x in rows_of(1).items() if gate or role != "gate"}
    join = max if reduction == "max" else lambda *values: sum(values)
    ffn = [role for role in ("gate", "up", "down") if role in rows]
    channels = [join(*(float(rows[role][c]) for role in ffn)) for c in range(5)]
    assert unit_scores(rows, "channel", reduction).tolist() == pytest.approx(channels)

    def q(role: str, g: int, i: int) -> float:
        return sum(float(rows[role][g, h, i]) for h in range(3))

    for g in range(2):
        key, value = rows["key"][g].tolist(), rows["value"][g].tolist()
        expected = sum(
            join(q("query", g, i), key[i], value[i], q("output", g, i)) for i in range(4)
        )
        assert float(unit_scores(rows, "group", reduction)[g]) == pytest.approx(expected)
        for h in range(3):
            a, b = rows["query"][g, h].tolist(), rows["output"][g, h].tolist()
            expected = sum(join(a[i], b[i]) for i in range(4))
            assert float(unit_scores(rows, "query", reduction)[g, h]) == pytest.approx(expected)
        for i in range(4):
            expected = join(value[i], q("output", g, i))
            assert float(unit_scores(rows, "value", reduction)[g, i]) == pytest.approx(expected)


def test_the_maximum_stands_values_narrower_than_keys() -> None:
    rows = {role: x.abs() for role, x in rows_of(2).items()}
    narrow = rows | {"value": rows["value"][:, :3], "output": rows["output"][..., :3]}
    missing = rows | {"value": rows["value"].clone(), "output": rows["output"].clone()}
    missing["value"][:, 3] = missing["output"][..., 3] = 0
    for axis in ("group", "query"):
        assert torch.allclose(unit_scores(narrow, axis, "max"), unit_scores(missing, axis, "max"))


def samples_of(count: int, entries: int = 6) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    return rows_of(99, entries), [rows_of(seed, entries) for seed in range(count)]


def whole(
    estimate: Estimate,
    weights: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    shares: list[float],
    axis: str,
) -> Tensor:
    """The score from tensors of all samples at once."""
    rows = {}
    for role, weight in weights.items():
        terms = [
            contribution(estimate, g[role] * weight) * share
            for g, share in zip(gradients, shares, strict=True)
        ]
        rows[role] = row_scores(estimate, torch.stack(terms).sum(0))
    return unit_scores(rows, axis)


@pytest.mark.parametrize("weighting", ["uniform", "loss"])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_running_sums_are_the_whole_tensors(estimate: Estimate, weighting: Any) -> None:
    weights, gradients = samples_of(4)
    losses = [2.0, 1.0, 4.0, 0.5]
    sums = TaylorSums([estimate], ["group", "channel"], weighting=weighting)
    for layer in (1, 0):
        for number, gradient in enumerate(gradients):
            scaled = {role: g * (layer + 1) for role, g in gradient.items()}
            sums.fold(number, losses[number], layer, weights, scaled)
        sums.finish(layer, weights)
    found = sums.result()[estimate]
    shares = [0.25] * 4 if weighting == "uniform" else [x / sum(losses) for x in losses]
    for layer in (0, 1):
        scaled = [{role: g * (layer + 1) for role, g in each.items()} for each in gradients]
        for axis in ("group", "channel"):
            assert found[axis][layer].dtype == torch.float32
            expected = whole(estimate, weights, scaled, shares, axis)
            assert torch.allclose(found[axis][layer], expected, rtol=1e-5)


def test_sums_are_in_float32_whatever_the_weights_are() -> None:
    weights, gradients = samples_of(40)
    sums = TaylorSums(["element1"], ["channel"])
    low = {role: w.bfloat16() for role, w in weights.items()}
    exact = TaylorSums(["element1"], ["channel"])
    for number, gradient in enumerate(gradients):
        rounded = {role: g.bfloat16() for role, g in gradient.items()}
        sums.fold(number, 1.0, 0, low, rounded)
        exact.fold(
            number,
            1.0,
            0,
            {role: w.float() for role, w in low.items()},
            {role: g.float() for role, g in rounded.items()},
        )
    sums.finish(0, low)
    exact.finish(0, weights)
    a, b = (s.result()["element1"]["channel"][0] for s in (sums, exact))
    assert torch.equal(a, b)


def held(sums: TaylorSums) -> int:
    return sum(x.numel() * x.element_size() for x in sums._sums.values())


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_memory_is_a_layer_or_a_number_for_each_row(estimate: Estimate) -> None:
    weights, gradients = samples_of(3, entries=50)
    sums = TaylorSums([estimate], ["group", "channel"])
    entries = 4 * sum(x.numel() for x in weights.values())
    expected = entries if estimate in BY_ENTRY else entries // 50
    for layer in (1, 0):
        for number, gradient in enumerate(gradients):
            sums.fold(number, 1.0, layer, weights, gradient)
            assert held(sums) == expected
        sums.finish(layer, weights)
        assert held(sums) == 0


def test_only_the_axes_that_are_scored_are_summed() -> None:
    weights, gradients = samples_of(1)
    sums = TaylorSums(["mixed"], ["channel"])
    sums.fold(0, 1.0, 0, weights, gradients[0])
    assert {role for _, _, role in sums._sums} == {"gate", "up", "down"}
    sums.finish(0, weights)
    assert sums.result()["mixed"].keys() == {"channel"}


class Together:
    """Sums over processes that run one after the other: first they are noted, then handed out."""

    def __init__(self) -> None:
        self.calls: list[list[Tensor]] = []
        self.place = 0

    def note(self, tensor: Tensor) -> Tensor:
        if self.place == len(self.calls):
            self.calls.append([])
        self.calls[self.place].append(tensor.clone())
        self.place += 1
        return tensor

    def hand_out(self, tensor: Tensor) -> Tensor:
        self.place += 1
        return torch.stack(self.calls[self.place - 1]).sum(0)


@pytest.mark.parametrize("weighting", ["uniform", "loss"])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_processes_score_as_one_does(estimate: Estimate, weighting: Any) -> None:
    weights, gradients = samples_of(3)
    losses = [2.0, 1.0, 4.0]
    shares, together, results = [[0, 1, 2], [0, 2], [1], []], Together(), []
    for reduce in (None, together.note, together.hand_out):
        for share in shares[:1] if reduce is None else shares[1:]:  # the last has no samples
            together.place = 0
            options: Any = {} if reduce is None else {"reduce": reduce}
            sums = TaylorSums([estimate], ["group", "channel"], weighting=weighting, **options)
            for number in share:
                sums.fold(number, losses[number], 0, weights, gradients[number])
            sums.finish(0, weights)
            if reduce != together.note:
                results.append(sums.result()[estimate])
    assert len(results) == 4
    for other in results[1:]:
        for axis in ("group", "channel"):
            assert torch.allclose(other[axis][0], results[0][axis][0], rtol=1e-5)
