"""Where a model's activations meet its gates: hooks on what reads units and writes the stream."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_prune.masks.bottleneck import Gates, Place
from lit_prune.structure.dims import Dim
from lit_prune.structure.model import Site, Structure

#: What RMS norms do; those of `lit_prune.structure.norms.NormRescale` that masks train with.
GatedNorms = Literal["masked", "none"]


def attach(
    gates: Gates,
    model: nn.Module,
    structure: Structure,
    *,
    norm_rescale: GatedNorms = "masked",
) -> ExitStack:
    """Multiply a model's activations by its gates.

    Groups and channels are gated where they are read (the inputs of O and down), residual features
    at every write to the stream (embeddings, O and down). A LayerNorm takes its statistics over
    the features weighed by how far they are kept, and passes them on as far, so that at hard masks
    it computes what it will over fewer features.

    Args:
        gates: The gates, made for this structure's widths.
        model: The model.
        structure: Its structure.
        norm_rescale: As for the cut that follows: RMS norms divide by the mean over all features
            (``masked``), or over those that are kept (``none``).

    Returns:
        A context manager; leaving or closing it takes the hooks off.
    """
    stack, number = ExitStack(), 0

    def hooked(handle: Any) -> None:
        stack.callback(handle.remove)

    hooked(model.register_forward_pre_hook(lambda *_: gates.refresh()))
    for site in structure.sites(model):
        module = model.get_submodule(site.path)
        for axis in ("group", "channel"):
            if (axis, site.layer) in gates.sizes and axis in (site.line.reads or ()):
                gate = _Gate(gates, structure, site, (axis, site.layer), number)
                hooked(module.register_forward_pre_hook(gate.on_input))
                number += 1
        if ("hidden", None) not in gates.sizes or "hidden" not in site.line.writes:
            continue
        if site.line.reads is None:
            if isinstance(module, nn.LayerNorm) or norm_rescale == "none":
                hooked(module.register_forward_hook(_Norm(gates)))
        else:
            gate = _Gate(gates, structure, site, ("hidden", None), number)
            hooked(module.register_forward_hook(gate.on_output))
            number += 1
    return stack


class _Gate:
    """The gates of one place at one module.

    Args:
        gates: All gates.
        structure: Of the model.
        site: The module.
        place: Whose gates.
        number: Decides the noise.
    """

    def __init__(
        self, gates: Gates, structure: Structure, site: Site, place: Place, number: int
    ) -> None:
        self.gates, self.place, self.number = gates, place, number
        dim: Dim | None = site.line.writes if place[0] == "hidden" else site.line.reads
        if dim is None:
            raise TypeError(f"expected {site.path} to read {place[0]}")
        index = dim.coordinates(structure.widths.sizes(site.layer))[place[0]]
        is_plain = torch.equal(index, torch.arange(gates.sizes[place], device="cpu"))
        #: The unit of each entry; None where each entry is one.
        self.index = None if is_plain else index

    def on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._multiply(args[0]), *args[1:])

    def on_output(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._multiply(output)

    def _multiply(self, x: Tensor) -> Tensor:
        mean, deviation = self.gates.mean(self.place), self.gates.deviation(self.place)
        if self.index is not None:
            self.index = self.index.to(mean.device)
            mean = mean[self.index]
            deviation = None if deviation is None else deviation[self.index]
        if deviation is None:
            return x * mean.to(x.dtype)
        seed = self.gates.noise_seed(self.number)
        return _Noisy.apply(x, mean, deviation, seed)  # pyright: ignore[reportReturnType]


class _Norm:
    """A norm over the features that are kept."""

    def __init__(self, gates: Gates) -> None:
        self.gates = gates

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        keep = self.gates.keep(("hidden", None))
        if not isinstance(module, nn.LayerNorm):
            return output * keep.mean().sqrt().to(output.dtype)
        share = keep / keep.sum()
        x = args[0].to(torch.promote_types(args[0].dtype, keep.dtype))
        centred = x - (x * share).sum(-1, keepdim=True)
        variance = (centred.square() * share).sum(-1, keepdim=True)
        normed = centred * torch.rsqrt(variance + module.eps)
        normed = normed * module.weight + (0 if module.bias is None else module.bias)
        return (normed * keep).to(output.dtype)


class _Noisy(torch.autograd.Function):
    """x (mean + deviation * noise); the noise is drawn again instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, deviation: Tensor, seed: int) -> Tensor:
        ctx.save_for_backward(x, mean, deviation)
        ctx.seed = seed
        return x * _drawn(x, mean, deviation, _noise(x, seed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mean, deviation = ctx.saved_tensors
        noise = _noise(x, ctx.seed)
        product = grad * x
        to_mean = product.flatten(0, -2).sum(0, dtype=mean.dtype)
        to_deviation = (product * noise).flatten(0, -2).sum(0, dtype=mean.dtype)
        to_x = grad * _drawn(x, mean, deviation, noise) if ctx.needs_input_grad[0] else None
        return to_x, to_mean, to_deviation, None


def _noise(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _drawn(x: Tensor, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    return torch.addcmul(mean.to(x.dtype), deviation.to(x.dtype), noise)
