"""The weight update: what a unit's mask learned to multiply it by, folded into the weights.

Source: "Efficient LLM Pruning with Token-Dependency Awareness and Hardware-Adapted Inference",
section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.masks.adaptation import Units
from lit_prune.structure.dims import Dim
from lit_prune.structure.layout import Layout
from lit_prune.structure.model import Site, Structure


def check_fold(model: nn.Module, structure: Structure) -> None:
    """Refuse a model in which `fold` could not undo what it does to a tied embedding.

    Raises:
        UserError: The head is tied to the embedding and no norm comes before it.
    """
    if _is_tied(model, structure) and _final_norm(model, structure) is None:
        raise UserError(
            "expected a final norm before a head that is tied to the embedding, got none; switch "
            "the weight update or the axis hidden off"
        )


@torch.no_grad()
def fold(model: nn.Module, structure: Structure, means: Units, layout: Layout) -> None:
    """Update the weights by the masks' means, in place: what a unit was multiplied by.

    The means of residual features go into whatever writes the stream (embeddings, the rows and
    biases of O and down), those of groups and channels into the columns of O and down. Where the
    head is tied to the embedding, the final norm's weight and bias are divided by the means, so
    that the head reads what it read. Each is computed in float32 and rounded once.

    Groups and channels that go are updated, too: a restoration is to make up for what they were
    worth to the masked model, not for what they were worth to the dense one. Residual features
    that go keep their weights, since a mean near 0 can't be divided by.

    Source: equation 6.

    Args:
        model: The dense model.
        structure: Its structure.
        means: mu of each unit; 1 for units without a mask.
        layout: The units that stay.

    Raises:
        UserError: See `check_fold`.
    """
    hidden = None
    if "hidden" in means:
        check_fold(model, structure)
        hidden = _filled(means["hidden"][0], layout.hidden)
    labels = {label.name: label for label in structure.labels(model)}
    for site in structure.sites(model):
        values = {} if hidden is None else {"hidden": hidden}
        if site.layer is not None:
            layer = site.layer
            values |= {axis: means[axis][layer] for axis in means if axis != "hidden"}
        factors = _factors(structure, site, values)
        for name, parameter in model.get_submodule(site.path).named_parameters(recurse=False):
            dims = labels[f"{site.path}.{name}"].dims
            _scale(parameter, [factors.get(dim) for dim in dims])
    if hidden is not None and _is_tied(model, structure):
        norm: Any = _final_norm(model, structure)
        offset = 1.0 if structure.family.norm == "rms_plus_one" else 0.0
        for parameter in norm.parameters(recurse=False):
            _scale(parameter, [1 / hidden], offset)


def _factors(structure: Structure, site: Site, values: Mapping[str, Tensor]) -> dict[Dim, Tensor]:
    """What the entries of a module's dimensions are multiplied by.

    Args:
        structure: The structure.
        site: The module.
        values: A value per unit of each gated axis.
    """
    reads, writes, result = site.line.reads, site.line.writes, {}
    if reads is None:
        return result
    sizes = structure.widths.sizes(site.layer)
    for axis, units in values.items():
        dim = writes if axis == "hidden" else reads
        if axis in dim:
            result[dim] = units[dim.coordinates(sizes)[axis]]
    return result


def _filled(values: Tensor, keep: Tensor | None) -> Tensor:
    """The values of kept units and 1 for the others."""
    if keep is None:
        return values
    return torch.ones_like(values).index_copy(0, keep, values[keep])


def _scale(parameter: nn.Parameter, factors: Sequence[Tensor | None], offset: float = 0.0) -> None:
    """Multiply a parameter along its dimensions; its effective value is `offset` higher."""
    if all(factor is None for factor in factors):
        return
    value = parameter.data.float() + offset
    for place, factor in enumerate(factors):
        if factor is not None:
            value = value * factor.to(value.device).unflatten(
                0, (-1, *[1] * (value.dim() - place - 1))
            )
    parameter.data.copy_(value - offset)


def _is_tied(model: nn.Module, structure: Structure) -> bool:
    """Whether a parameter writes the residual stream and reads it, as embedding and head."""
    writers: set[int] = set()
    readers: set[int] = set()
    for site in structure.sites(model):
        if site.line.reads is None or site.layer is not None:
            continue
        found = {id(p) for p in model.get_submodule(site.path).parameters(recurse=False)}
        if "hidden" in site.line.writes:
            writers |= found
        if "hidden" in site.line.reads:
            readers |= found
    return bool(writers & readers)


def _final_norm(model: nn.Module, structure: Structure) -> nn.Module | None:
    """The norm behind the layers; the table lists modules as the data flows."""
    path = None
    for site in structure.sites(model):
        if site.layer is None and site.line.reads is None and site.line.writes.name == "hidden":
            path = site.path
    return None if path is None else model.get_submodule(path)
