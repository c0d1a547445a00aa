"""Zeroth-order gradients: two forward passes a sample, and noise that is made anew, never kept.

A sample's slope c = (L(θ + εz) - L(θ - εz)) / 2ε is a number; the estimate of the gradient is the
mean of c z over samples, with z ~ N(0, I) drawn again from what it is for: a seed, the sample and
the tensor. Slopes of samples that several processes share are therefore all they must exchange.

Source: "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
Approximation"; MINI-LLM, zeroth-order gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.evaluation.perplexity import token_nll
from lit_prune.gradients.folded import labels_of
from lit_prune.modes import evaluating
from lit_prune.scores.random import generator_for
from lit_prune.structure.dims import PER_GROUP
from lit_prune.structure.model import Site, Structure

Batch = Mapping[str, Tensor]


class Noise(Protocol):
    """Something to add noise to."""

    def applied(self, sample: int, scale: float) -> AbstractContextManager[None]:
        """Within the context, the model runs with `scale` times a sample's noise added."""
        ...


def normal(shape: Sequence[int], device: torch.device | str, *key: int | str) -> Tensor:
    """Standard normal noise, float32, the same for the same key on the same kind of device."""
    generator = generator_for(device, *key)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=device)


def windows(
    batches: Sequence[Batch], count: int, batch_size: int, *, rank: int = 0, world: int = 1
) -> list[tuple[int, Batch]]:
    """The first windows of a calibration set one by one, as far as they are in a process' share.

    Args:
        batches: The share: every `world`-th batch of the set, from the `rank`-th on.
        count: How many windows to take from the whole set.
        batch_size: Windows of a batch; the set's last batch may have fewer.
        rank: The process' number.
        world: Number of processes.

    Returns:
        Windows [1, tokens], each with its number in the whole set.
    """
    found: list[tuple[int, Batch]] = []
    seen = 0
    for place, batch in enumerate(batches):
        # alone by counting, for batches may have been halved
        first = seen if world == 1 else (rank + place * world) * batch_size
        seen += len(batch["input_ids"])
        for row in range(len(batch["input_ids"])):
            if first + row < count:
                found.append((first + row, {k: v[row : row + 1] for k, v in batch.items()}))
    return found


@torch.no_grad()
def loss_slopes(
    model: nn.Module,
    samples: Iterable[tuple[int, Batch]],
    noise: Noise,
    count: int,
    scale: float,
    *,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> Tensor:
    """Slope of each sample's loss along its noise, by a central difference.

    No autograd graph is built. The loss is the mean over predicted tokens, taken in float32 token
    by token, so that a difference far below the loss itself is not lost.

    Args:
        model: A causal language model; it is left as it was, to the bit.
        samples: Numbers in [0, count), each with `input_ids`, `attention_mask` and, if they differ
            from the tokens, `labels`, [1, tokens].
        noise: What is perturbed.
        count: Number of samples over all processes.
        scale: ε.
        track: Wraps the samples in a progress bar.

    Returns:
        [count], float32, on the model's device; 0 for samples of other processes, so that the sum
        over processes is the whole.

    Raises:
        UserError: A loss is not finite.
    """
    slopes = torch.zeros(count, dtype=torch.float32, device=next(model.parameters()).device)
    with evaluating(model):
        for number, batch in track(samples):
            with noise.applied(number, scale):
                above = _nll(model, batch)
            with noise.applied(number, -scale):
                difference = above - _nll(model, batch)
            if not len(difference):
                continue
            slope = float(difference.cpu().double().mean()) / (2 * scale)
            if not math.isfinite(slope):
                raise UserError(
                    f"expected finite losses around the weights, got a slope of {slope} in "
                    f"calibration window {number}; check the model's weights, or use "
                    f"--model.dtype float32"
                )
            slopes[number] = slope
    return slopes


def _nll(model: nn.Module, batch: Batch) -> Tensor:
    """Loss of each predicted token, [predicted], float32."""
    device = next(model.parameters()).device
    mask = batch["attention_mask"].to(device)
    logits = model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=None if bool(mask.all()) else mask,
        use_cache=False,
    ).logits
    return token_nll(logits, labels_of(batch).to(logits.device))


class WeightNoise:
    """Noise on parameters of modules that read them in their own forward pass, as linear ones do.

    While a module runs its parameters show perturbed copies, rounded once to their dtype; the
    tensors themselves are never written to. So one module is perturbed at a time, and nothing has
    to be undone: adding ε z, -2 ε z and ε z in bfloat16 would destroy the weights. A bfloat16
    weight above 0.2 or so absorbs most noise of 1e-3; ε must be larger for such models.

    Args:
        model: The model.
        names: Parameters to perturb.
        seed: Fixes the noise.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], seed: int) -> None:
        self.model, self.seed = model, seed
        self.modules: dict[str, list[str]] = {}
        for name in names:
            self.modules.setdefault(name.rpartition(".")[0], []).append(name)

    @contextmanager
    def applied(self, sample: int, scale: float) -> Iterator[None]:
        """Within the context, the model runs with `scale` times a sample's noise added."""
        swapped: list[tuple[nn.Parameter, Tensor]] = []

        def swap(names: Sequence[str]) -> None:
            for name in names:
                parameter = self.model.get_parameter(name)
                noise = self._noise(sample, name, parameter).mul_(scale).add_(parameter.data)
                swapped.append((parameter, parameter.data))
                parameter.data = noise.to(parameter.dtype)

        def restore(*_: Any) -> None:
            while swapped:
                parameter, original = swapped.pop()
                parameter.data = original

        with ExitStack() as stack:
            stack.callback(restore)  # after an error, too
            for path, names in self.modules.items():
                module = self.model.get_submodule(path)
                before = module.register_forward_pre_hook(lambda *_, names=names: swap(names))
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(restore).remove)
            yield

    def gradient(self, name: str, slopes: Tensor) -> Tensor:
        """The estimate of a parameter's gradient: mean_n c_n z_n, replayed from the seeds.

        Args:
            name: The parameter.
            slopes: c of every sample, [samples].

        Returns:
            The parameter's shape, float32, on its device.
        """
        parameter = self.model.get_parameter(name)
        total = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        for sample, slope in enumerate(slopes.tolist()):
            total.add_(self._noise(sample, name, parameter), alpha=slope / len(slopes))
        return total

    def _noise(self, sample: int, name: str, parameter: Tensor) -> Tensor:
        return normal(parameter.shape, parameter.device, self.seed, sample, name)


class GateNoise:
    """Noise on one multiplicative gate per unit, at the inputs of the modules that read units.

    Gates are 1 + noise; there are far fewer of them than weights, so that slopes of few samples say
    more about each. Untested by any paper.

    Args:
        model: The model.
        structure: Its structure.
        axes: Axes of its layers.
        seed: Fixes the noise.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, axes: Sequence[str], seed: int
    ) -> None:
        self.model, self.structure, self.seed = model, structure, seed
        self.sites: list[tuple[str, Site]] = [
            (axis, structure.readers(model, axis, layer)[0])
            for layer in range(len(structure.widths.layers))
            for axis in axes
        ]

    @contextmanager
    def applied(self, sample: int, scale: float) -> Iterator[None]:
        """Within the context, the model runs with `scale` times a sample's noise added."""
        with ExitStack() as stack:
            for axis, site in self.sites:
                gates = 1 + scale * self._entries(sample, axis, site)
                reader = self.model.get_submodule(site.path)
                stack.callback(reader.register_forward_pre_hook(_Gate(gates)).remove)
            yield

    def gradient(self, layer: int, axis: str, slopes: Tensor) -> Tensor:
        """The estimate of the gates' gradients: mean_n c_n η_n.

        Args:
            layer: The layer.
            axis: The axis.
            slopes: c of every sample, [samples].

        Returns:
            [units], or [groups, units] for `query` and `value`, float32, on the CPU.
        """
        draws = [self._draw(sample, axis, layer) for sample in range(len(slopes))]
        return torch.stack(
            [draw * slope for draw, slope in zip(draws, slopes.tolist(), strict=True)]
        ).mean(0)

    def _draw(self, sample: int, axis: str, layer: int | None) -> Tensor:
        sizes = self.structure.widths.sizes(layer)
        shape = (sizes["group"], sizes[axis]) if axis in PER_GROUP else (sizes[axis],)
        return normal(shape, "cpu", self.seed, sample, f"{layer}.{axis}")

    def _entries(self, sample: int, axis: str, site: Site) -> Tensor:
        """The noise of the unit that each entry of a reader's input belongs to, [entries]."""
        if site.line.reads is None:
            raise TypeError(f"expected {site.path} to read an axis")
        grid = site.line.reads.coordinates(self.structure.widths.sizes(site.layer))
        draw = self._draw(sample, axis, site.layer)
        return draw[grid["group"], grid[axis]] if axis in PER_GROUP else draw[grid[axis]]


class _Gate:
    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # in float32: a bfloat16 gate near 1 would have steps of 0.8 %
        gated = args[0].float() * self.gates.to(args[0].device)
        return (gated.to(args[0].dtype), *args[1:])
