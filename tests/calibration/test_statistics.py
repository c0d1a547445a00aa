"""Running means and variances against those of all tokens at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lit_prune.calibration.statistics import InputStatistics, require_finite
from lit_prune.errors import UserError


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


def activations(sizes: tuple[int, ...] = (7, 1, 40, 3), mean: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 0.05, 50.0, 0.0, 2.0])
    shift = torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0]) * mean
    return [torch.randn(size, 5, generator=generator) * scale + shift for size in sizes]


def of(batches: list[Tensor], *, gram: bool = False) -> InputStatistics:
    statistics = InputStatistics(5, "cpu", gram=gram)
    for x in batches:
        statistics.add(x)
    return statistics


def check(found: InputStatistics, batches: list[Tensor], tolerance: float = 1e-5) -> None:
    x = torch.cat(batches).double()
    assert found.tokens == len(x)
    assert found.mean.dtype == found.variance.dtype == found.norms().dtype == torch.float32
    assert torch.allclose(found.mean.double(), x.mean(0), rtol=1e-6, atol=1e-5)
    variance = x.var(0, correction=0)
    assert torch.allclose(found.variance.double(), variance, rtol=tolerance, atol=1e-12)
    assert torch.allclose(found.norms().double(), x.norm(dim=0), rtol=1e-5)
    if found.gram is not None:
        assert torch.allclose(found.gram.matrix.double(), x.T @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("sizes", [(7, 1, 40, 3), (51,), (1,), (1,) * 30, (0, 4, 0, 3)])
def test_batches_of_any_size_give_the_statistics_of_all_tokens(
    sizes: tuple[int, ...], gram: bool
) -> None:
    check(of(activations(sizes), gram=gram), activations(sizes))


def test_a_large_mean_leaves_a_small_variance_its_digits() -> None:
    batches = activations((500, 20, 1, 300), mean=1e4)
    found = of(batches)
    # the inputs themselves have steps of 1e-3 there
    check(found, batches, tolerance=1e-3)
    x = torch.cat(batches)
    naive = x.square().mean(0) - x.mean(0).square()
    exact = x.double().var(0, correction=0)
    assert (naive.double() - exact).abs()[0] > 0.1 * exact[0], "sums of squares would not do"
    assert found.variance[3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_summed_in_float32(dtype: torch.dtype) -> None:
    batches = [x.to(dtype) for x in activations(mean=3.0)]
    check(of(batches, gram=True), batches)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("split", [(2, 2), (1, 3), (0, 4), (4, 0)])
def test_processes_join_to_what_one_would_have_seen(split: tuple[int, int], mean: float) -> None:
    batches = activations((60, 1, 40, 3), mean)
    parts = [of(batches[: split[0]], gram=True), of(batches[split[0] :], gram=True)]
    assert [part.tokens for part in parts] == [
        sum(map(len, own)) for own in (batches[: split[0]], batches[split[0] :])
    ]
    reduce_together(parts)
    for part in parts:
        check(part, batches, tolerance=1e-5 if mean == 0 else 1e-3)
    for name in ("mean", "variance"):
        assert torch.equal(getattr(parts[0], name), getattr(parts[1], name))
    assert parts[0].gram is not None
    assert parts[1].gram is not None
    assert torch.equal(parts[0].gram.matrix, parts[1].gram.matrix)


def reduce_together(parts: list[InputStatistics]) -> None:
    """Run two processes' `reduce` side by side: each sum waits for the other's part."""
    barrier, board = threading.Barrier(2, timeout=10), {}

    def run(rank: int) -> None:
        def add(tensor: Tensor) -> Tensor:
            board[rank] = tensor.clone()
            barrier.wait()
            total = board[0] + board[1]
            barrier.wait()
            return total

        parts[rank].reduce(add)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_alone_nothing_is_joined() -> None:
    found, before = of(activations()), of(activations())
    found.reduce(lambda tensor: tensor)
    check(found, activations())
    assert torch.allclose(found.variance, before.variance, rtol=1e-6)
    assert found.gram is None


def test_without_tokens_everything_is_zero() -> None:
    for batches in ([], [torch.zeros(0, 5)]):
        found = of(batches, gram=True)
        for _ in range(2):
            assert found.tokens == 0
            for values in (found.mean, found.variance, found.norms()):
                assert torch.equal(values, torch.zeros(5))
            found.reduce(lambda tensor: tensor)


def test_they_are_float32_whatever_is_the_default() -> None:
    batches = activations()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = of(batches, gram=True)
        found.reduce(lambda tensor: tensor)
    finally:
        torch.set_default_dtype(torch.float32)
    check(found, batches)


def test_what_is_not_finite_is_an_error() -> None:
    require_finite(torch.zeros(3), "weights", "here")
    for value in ("nan", "inf", "-inf"):
        text = "expected finite weights, got NaN or infinity in q_proj; check the model's weights"
        with pytest.raises(UserError, match=text) as caught:
            require_finite(torch.tensor([0.0, float(value)]), "weights", "in q_proj")
        assert "\n" not in str(caught.value)
        broken = activations()
        broken[1][0, 2] = float(value)
        assert not torch.isfinite(of(broken).norms()[2])
        assert torch.isfinite(of(broken).norms()[:2]).all()
