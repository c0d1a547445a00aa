"""Gradients of low rank in place of the weights' own: estimated from LoRA factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.gradients.folded import Fold, differentiating, finite_of, loss_of
from lit_prune.structure.coupling import names_of, parts, view
from lit_prune.structure.model import Structure


@dataclass(frozen=True)
class LoRA:
    """How the factors are made and trained before their gradients are taken.

    Attributes:
        rank: Rows of A.
        alpha: Scale of B A times rank.
        steps: AdamW steps on all batches together.
        learning_rate: Their learning rate.
        seed: Seed of A.
    """

    rank: int = 8
    alpha: float = 16.0
    steps: int = 5
    learning_rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or self.steps < 0 or not self.learning_rate > 0:
            raise UserError(
                "expected LoRA gradients of rank >= 1, alpha > 0, steps >= 0 and a learning rate "
                f"above 0, got rank {self.rank}, alpha {self.alpha:g}, steps {self.steps} and "
                f"learning rate {self.learning_rate:g}"
            )

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank


class Factors:
    """A and B of one linear module, added to its output by a hook; the module stays as it is.

    Args:
        module: A linear module with inputs x: W x becomes W x + scale B A x.
        rank: Rows of A.
        scale: Factor of B A.
        generator: Draws A from U(-1/√in, 1/√in); B is 0.
    """

    def __init__(
        self, module: nn.Module, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        weight = module.get_parameter("weight")
        self.module, self.scale = module, scale
        self.transposed = isinstance(module, Conv1D)
        outputs, inputs = weight.shape[::-1] if self.transposed else weight.shape
        bound = 1 / math.sqrt(inputs)
        drawn = torch.empty(rank, inputs, dtype=torch.float32, device="cpu")
        drawn.uniform_(-bound, bound, generator=generator)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.down = nn.Parameter(drawn.to(weight.device, dtype))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device, dtype=dtype))

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The hook."""
        x = args[0].to(self.down.dtype)
        return output + (self.scale * (x @ self.down.T) @ self.up.T).to(output.dtype)

    def merged(self) -> Tensor:
        """W + scale B A, in the weight's own shape."""
        update = self.scale * (self.up @ self.down).detach()
        weight = self.module.get_parameter("weight").detach()
        return weight + (update.T if self.transposed else update)

    def estimate(self, down: Tensor, up: Tensor) -> Tensor:
        """The weight's gradient from those of A and B, in the weight's own shape.

        ∂L/∂B A + B ∂L/∂A - ∂L/∂B ∂L/∂A, times in / (scale ‖A‖²), which makes it the gradient
        itself in the mean over A while B is 0.

        Args:
            down: ∂L/∂A.
            up: ∂L/∂B.
        """
        a, b = self.down.detach(), self.up.detach()
        found = up @ (a - down) + b @ down
        found *= a.shape[1] / (self.scale * a.square().sum())
        return found.T if self.transposed else found


def lora_gradients(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    fold: Fold,
    lora: LoRA,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> None:
    """Estimate the gradients of each batch's loss from LoRA on every linear module of the layers.

    A and B are trained for some steps on the batches first. No weight of the model gets a
    gradient; biases, which LoRA leaves out, get their own. It is a noisy projection of the gradient
    where the rank is much smaller than the matrices.

    Source: "Structured Pruning for Large Language Models Using Coupled Components Elimination and
    Minor Fine-tuning", section 4.1; the estimate is that of "Pruning Meets Low-Rank
    Parameter-Efficient Fine-Tuning".

    Args:
        model: A causal language model; it stays as it is.
        structure: Its structure.
        batches: This process' batches of `input_ids`, `attention_mask` and `labels`.
        fold: See `lit_prune.gradients.folded.weight_gradients`; the weights are W + scale B A.
        lora: How A and B are made and trained.
        reduce: Sums a tensor over the processes.
        track: Wraps the batches in a progress bar.

    Raises:
        UserError: A loss is not finite.
    """
    layers = range(len(structure.widths.layers))
    names = [name for layer in layers for name in names_of(model, structure, layer)]
    biases = [name for name in names if name.endswith(".bias")]
    generator = torch.Generator().manual_seed(lora.seed)
    with differentiating(model, biases), ExitStack() as stack:
        factors: dict[str, Factors] = {}
        for name in (name for name in names if name not in biases):
            module = model.get_submodule(name.removesuffix(".weight"))
            factors[name] = Factors(module, lora.rank, lora.scale, generator)
            stack.callback(module.register_forward_hook(factors[name]).remove)
        _train(model, batches, list(factors.values()), lora, reduce)
        wanted = [model.get_parameter(name) for name in biases]
        wanted += [tensor for f in factors.values() for tensor in (f.down, f.up)]
        for number, batch in enumerate(track(batches)):
            loss = loss_of(model, batch)
            value = finite_of(loss)
            found = torch.autograd.grad(loss, wanted)
            slopes: dict[Tensor, Tensor] = dict(zip(wanted, found, strict=True))
            for layer in layers:
                with torch.no_grad():
                    fold(number, value, layer, *_rows(model, structure, layer, factors, slopes))


def _train(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    factors: Sequence[Factors],
    lora: LoRA,
    reduce: Callable[[Tensor], Tensor],
) -> None:
    """Train A and B on the mean loss of all processes' batches."""
    trained = [tensor for f in factors for tensor in (f.down, f.up)]
    number = reduce(torch.tensor(len(batches), device=trained[0].device))
    optimizer = torch.optim.AdamW(trained, lr=lora.learning_rate)
    for _ in range(lora.steps):
        total = torch.zeros(sum(tensor.numel() for tensor in trained)).to(trained[0])
        for batch in batches:
            loss = loss_of(model, batch)
            finite_of(loss)
            found = torch.autograd.grad(loss / number, trained)
            total += torch.cat([gradient.flatten() for gradient in found])
        parts_ = reduce(total).split([tensor.numel() for tensor in trained])
        for tensor, gradient in zip(trained, parts_, strict=True):
            tensor.grad = gradient.view_as(tensor)
        optimizer.step()
        optimizer.zero_grad()


def _rows(
    model: nn.Module,
    structure: Structure,
    layer: int,
    factors: Mapping[str, Factors],
    slopes: Mapping[Tensor, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's merged weights and estimated gradients by role."""
    weights, found = {}, {}
    for name in names_of(model, structure, layer):
        if name in factors:
            own = factors[name]
            weights[name] = own.merged()
            found[name] = own.estimate(slopes[own.down], slopes[own.up])
        else:
            bias = model.get_parameter(name)
            weights[name], found[name] = bias.detach(), slopes[bias]
    known = parts(model, structure, layer)
    return (
        view(model, structure, layer, weights, known),
        view(model, structure, layer, found, known),
    )
