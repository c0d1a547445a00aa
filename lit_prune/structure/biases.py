"""Output biases where a family has none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.structure.model import Structure


def add_bias(module: nn.Module) -> None:
    """Give a linear module without a bias one of zeros, in place.

    It has the weight's dtype and device and is trained where the weight is; a module that has a
    bias keeps it. Unless another cut needs it anyway, `settle` then finds the model not to be
    stock, and an export carries the modelling file.

    Args:
        module: An `nn.Linear`, or a module with a bias.

    Raises:
        UserError: The module has no bias and is an adapter's, a quantized one or not linear.
    """
    if isinstance(getattr(module, "bias", None), Tensor):
        return
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise UserError(
            f"expected a linear module to add a bias to, got {type(module).__name__}; merge or "
            f"remove adapters first"
        )
    weight = module.weight
    zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    module.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def biased(model: nn.Module, structure: Structure) -> list[str]:
    """The paths of the linear modules that have a bias, be it the family's or an added one.

    Args:
        model: The model, with adapters on it or without.
        structure: Its structure.
    """
    paths = []
    for site in structure.sites(model):
        module = model.get_submodule(site.path)  # an adapter says its layer's bias
        if site.line.reads is not None and isinstance(getattr(module, "bias", None), Tensor):
            paths.append(site.path)
    return paths


def add_biases(model: nn.Module, paths: Iterable[str]) -> None:
    """Add a bias to each of some modules that lacks one; see `add_bias`.

    Args:
        model: The model, without adapters.
        paths: Paths of linear modules, as of `biased`.
    """
    for path in paths:
        add_bias(model.get_submodule(path))
