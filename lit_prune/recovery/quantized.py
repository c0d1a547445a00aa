"""Frozen linear layers in 8 or 4 bit, through bitsandbytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError, require

#: How the weights of frozen layers are held.
Precision = Literal["dense", "8bit", "4bit"]
_BLOCK = 64


def bitsandbytes() -> ModuleType:
    """The package bitsandbytes.

    Raises:
        UserError: It is not installed.
    """
    return require("bitsandbytes", "quant")


def check_precision(precision: str) -> None:
    """Refuse a precision that isn't known or can't be had.

    Raises:
        UserError: It is neither ``dense`` nor ``8bit`` nor ``4bit``, or bitsandbytes is missing.
    """
    if precision not in ("dense", "8bit", "4bit"):
        raise UserError(f"expected weights held as dense, 8bit or 4bit, got {precision!r}")
    if precision != "dense":
        bitsandbytes()


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is held in 8 or 4 bit.

    8 bit are whole numbers with a float32 scale for each output; 4 bit are NF4 (Dettmers et al.,
    "QLoRA: Efficient Finetuning of Quantized LLMs", 2023), a float32 scale for 64 weights. The
    weight is dequantized for the length of a product, in the forward and again in the backward
    pass; inputs stay what they are. Weights are always quantized on the CPU, so that a fit that
    resumes gets the same bits.

    Args:
        linear: A Linear or Conv1D. If it is kept its weight moves to the CPU.
        precision: ``8bit`` or ``4bit``.
        keep: Keep the dense layer, outside of the module tree; the state dict then holds its
            weight under the plain name, and loading one quantizes anew.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear | Conv1D, precision: Precision, *, keep: bool) -> None:
        super().__init__()
        weight = linear.weight
        device = weight.device
        self.transposed = isinstance(linear, Conv1D)
        self.in_features, self.out_features = weight.shape[:: 1 if self.transposed else -1]
        self.precision = precision
        if keep:
            weight.data = weight.data.cpu()
            self.bias = linear.bias
        else:
            copied = None if linear.bias is None else linear.bias.detach().clone()
            self.bias = None if copied is None else nn.Parameter(copied, requires_grad=False)
        # in lists: neither submodules nor buffers, which would be saved, cast and broadcast
        self._dense = [linear] if keep else []
        self._held: list[Tensor] = []
        self._hold(weight.detach())
        self._move(device)
        self.train(linear.training)

    def dense(self) -> nn.Linear | Conv1D:
        """The layer that this one stands for, on its device.

        Raises:
            UserError: It was not kept.
        """
        if not self._dense:
            raise UserError("expected a layer whose dense weight was kept, got one without")
        linear = self._dense[0]
        linear.weight.data = linear.weight.data.to(self._held[0].device)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the dequantized weight, in the dtype of `x` or of autocast."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [outputs, inputs] that the layer computes with."""
        functional: Any = bitsandbytes().functional
        codes, scales = self._held
        if self.precision == "8bit":
            return functional.int8_vectorwise_dequant(codes, scales).to(dtype)
        known = dtype in (torch.float32, torch.bfloat16, torch.float16)
        state = functional.QuantState(
            scales,
            shape=torch.Size((len(scales), _BLOCK)),
            dtype=dtype if known else torch.float32,
            blocksize=_BLOCK,
            quant_type="nf4",
        )
        flat = functional.dequantize_4bit(codes, state).flatten()
        shape = self.out_features, self.in_features
        return flat[: math.prod(shape)].view(shape).to(dtype)

    @torch.no_grad()
    def _hold(self, weight: Tensor) -> None:
        """Quantize a weight on the CPU."""
        functional: Any = bitsandbytes().functional
        with torch.inference_mode(False):
            rows = (weight.T if self.transposed else weight).to("cpu", torch.float32)
            if self.precision == "8bit":
                codes, scales, _ = functional.int8_vectorwise_quant(rows.contiguous())
            else:
                # whole blocks as rows: rows of odd length would be compiled for, seconds each
                flat = nn.functional.pad(rows.flatten(), (0, -rows.numel() % _BLOCK))
                codes, state = functional.quantize_4bit(
                    flat.view(-1, _BLOCK), blocksize=_BLOCK, quant_type="nf4"
                )
                scales = state.absmax
            self._held = [codes, scales]

    def _move(self, device: torch.device) -> None:
        self._held = [tensor.to(device) for tensor in self._held]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        if self._dense:
            weight = self._dense[0].weight
            dtype = fn(torch.empty(0, dtype=weight.dtype)).dtype
            if weight.dtype != dtype:
                weight.data = weight.data.to(dtype)
                device = self._held[0].device
                self._hold(weight)
                self._move(device)
        self._move(fn(torch.empty_like(self._held[0][:0])).device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._dense:
            weight = self._dense[0].weight
            destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if not self._dense:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        linear, device = self._dense[0], self._held[0].device
        linear._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # its bias is this one's
        self._hold(linear.weight)
        self._move(device)


class _Product(torch.autograd.Function):
    """x Wᵀ with a weight that is dequantized when it is needed, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantized(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's type)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None]:
        (gradient,) = grad_outputs
        return gradient @ ctx.layer.dequantized(gradient.dtype), None
