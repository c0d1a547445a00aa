"""Linear layers in 8 and 4 bit against literal quantization, and what they keep and save."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.recovery.quantized import QuantizedLinear, bitsandbytes, check_precision

SIZES = [(24, 16), (7, 13), (64, 128), (1, 1), (3, 50)]
PRECISIONS = ["8bit", "4bit"]


def make(
    outputs: int = 24, inputs: int = 16, *, kind: str = "linear", dtype: Any = torch.float32
) -> Any:
    torch.manual_seed(outputs * inputs)
    layer: Any = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=0.1)
    nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


def rows_of(layer: Any) -> Tensor:
    """The dense weight [outputs, inputs] in float64."""
    weight = layer.weight.detach().double()
    return weight.T if isinstance(layer, Conv1D) else weight


def nf4_levels() -> list[float]:
    """QLoRA's levels: 8 quantiles of the normal distribution above zero, 7 below, and zero."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1), above.flip(0)])
    return (levels / levels.abs().max()).tolist()


def literal(layer: Any, precision: str) -> Tensor:
    """Quantize and dequantize entry by entry."""
    rows = rows_of(layer)
    result = torch.zeros(rows.shape, dtype=rows.dtype)
    if precision == "8bit":
        for i, row in enumerate(rows):
            largest = max(abs(float(x)) for x in row)
            for j, x in enumerate(row):
                result[i, j] = round(float(x) / largest * 127) * largest / 127 if largest else 0
        return result
    flat, into, levels = rows.flatten().tolist(), result.view(-1), nf4_levels()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = max(map(abs, block)) or 1.0
        for offset, x in enumerate(block):
            into[start + offset] = largest * min(levels, key=lambda v: abs(v - x / largest))
    return result


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("size", SIZES)
def test_the_weight_is_quantized_literally(precision: Any, kind: str, size: tuple[int, int]):
    layer = make(*size, kind=kind)
    expected = literal(layer, precision)
    quantized = QuantizedLinear(layer, precision, keep=False)
    assert (quantized.out_features, quantized.in_features) == size
    torch.testing.assert_close(quantized.dequantized(torch.float64), expected, rtol=1e-5, atol=1e-7)
    if math.prod(size) > 1:
        assert not torch.equal(expected, rows_of(layer))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_and_gradient_are_those_of_the_dequantized_weight(
    precision: Any, kind: str, dtype: torch.dtype
):
    layer = make(kind=kind, dtype=dtype)
    weight = literal(layer, precision)
    quantized = QuantizedLinear(layer, precision, keep=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).to(dtype).requires_grad_()
    slope = torch.randn(2, 5, 24, generator=generator).to(dtype)
    y = quantized(x)
    y.backward(slope)
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)
    expected = F.linear(x.detach().double(), weight, layer.bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(x.grad.double(), slope.double() @ weight, rtol=rtol, atol=atol)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_gradient_is_the_numerical_one(precision: Any):
    quantized = QuantizedLinear(make(dtype=torch.float64), precision, keep=False)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quantized, x)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_decides_the_dtype(precision: Any):
    quantized = QuantizedLinear(make(), precision, keep=False)
    x = torch.randn(2, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_weight_is_kept_for_the_backward_pass_or_held_dense(precision: Any):
    quantized = QuantizedLinear(make(64, 128), precision, keep=False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        quantized(torch.randn(2, 128, requires_grad=True))
    assert saved == []
    held = sum(t.numel() * t.element_size() for t in quantized._held)
    small = {"8bit": 64 * 128 + 64 * 4, "4bit": 64 * 128 // 2 + 128 * 4}
    assert held == small[precision]
    assert quantized._dense == []
    assert [name for name, _ in quantized.named_parameters()] == ["bias"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros(precision: Any):
    layer = make(64, 64)
    layer.weight.data[3] = 0
    quantized = QuantizedLinear(layer, precision, keep=False)
    rows = quantized.dequantized(torch.float32)
    assert rows.isfinite().all()
    assert not rows[3].any()
    assert rows[2].any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_dense_layer_comes_back_as_it_was(precision: Any, kind: str):
    layer = make(kind=kind, dtype=torch.bfloat16).eval()
    weight, state = layer.weight, copy.deepcopy(layer.state_dict())
    quantized = QuantizedLinear(layer, precision, keep=True).train()
    back: Any = quantized.dense()
    assert back is layer
    assert back.weight is weight
    assert back.training
    assert all(torch.equal(back.state_dict()[key], state[key]) for key in state)
    with pytest.raises(UserError, match="was kept"):
        QuantizedLinear(layer, precision, keep=False).dense()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_state_dict_is_the_dense_one_and_loading_quantizes(precision: Any, kind: str):
    one, other = make(kind=kind), make(kind=kind)
    other.weight.data.mul_(-2).add_(0.01)
    other.bias.data.add_(1)
    keys, expected = list(one.state_dict()), literal(other, precision)
    model = nn.Sequential(QuantizedLinear(one, precision, keep=True))
    assert [key.removeprefix("0.") for key in model.state_dict()] == keys
    state = {f"0.{key}": value for key, value in other.state_dict().items()}
    assert model.load_state_dict(state).missing_keys == []
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    quantized: Any = model[0]
    torch.testing.assert_close(quantized.dequantized(torch.float64), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(quantized.bias, other.bias)
    for wrong, words in (({"0.bias": state["0.bias"]}, "0.weight"), (state | {"0.x": 1}, "0.x")):
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(wrong)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cast_rounds_the_dense_weight_and_quantizes_anew(precision: Any):
    layer, rounded = make(64, 128), make(64, 128).to(torch.bfloat16)
    model = nn.Sequential(QuantizedLinear(layer, precision, keep=True)).to(torch.bfloat16)
    quantized: Any = model[0]
    again = QuantizedLinear(rounded, precision, keep=True)
    for held, expected in zip(quantized._held, again._held, strict=True):
        assert held.dtype == expected.dtype
        assert torch.equal(held, expected)
    back: Any = quantized.dense()
    assert torch.equal(back.weight, rounded.weight)
    assert torch.equal(back.bias, rounded.bias)


def test_what_is_not_known_or_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    check_precision("4bit")
    with pytest.raises(UserError, match="dense, 8bit or 4bit, got '2bit'"):
        check_precision("2bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check_precision("dense")
    for call in (lambda: check_precision("8bit"), bitsandbytes):
        with pytest.raises(UserError, match=r"pip install 'lit-prune\[quant\]'") as error:
            call()
        assert "\n" not in str(error.value)


def test_importing_is_silent():
    command = [sys.executable, "-c", "import lit_prune.recovery.lora, bitsandbytes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
