"""Keys and values for each query head alone, where several heads share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.structure.cut import hook_values
from lit_prune.structure.dims import Dim
from lit_prune.structure.model import Structure

#: How attention modules count key-value heads, and the query heads that share one.
_COUNTS = ("num_key_value_heads", "num_kv_heads")
_SHARING = "num_key_value_groups"


@contextmanager
def unshared(model: nn.Module, structure: Structure) -> Iterator[Structure]:
    """Give every query head a key-value head of its own; the model computes what it did.

    The gradient of a shared key is the sum over its query heads, and fits none of them; a head's
    own copy has its own. Rows of K and V are repeated, so that they take as much memory as Q and O.

    Args:
        model: The model; after the context it has its own parameters again.
        structure: Its structure.

    Yields:
        The structure of the model within the context: as many groups as heads, one query each. It
        is `structure` itself where no heads share keys.

    Raises:
        UserError: The attention modules don't say how many key-value heads they have.
    """
    widths = structure.widths.copy()
    for sizes in widths.layers:
        sizes["group"], sizes["query"] = sizes["group"] * sizes["query"], 1
    if widths == structure.widths:
        yield structure
        return
    own = Structure(structure.family, widths)
    changes = _Changes()
    try:
        for layer in range(len(widths.layers)):
            if structure.widths.layers[layer]["query"] > 1:
                _repeat(model, structure, own, layer, changes)
                _count(model, own, layer, changes)
        yield own
    finally:
        changes.undo()


class _Changes:
    """Attributes that are set for a while."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, str, Any]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def undo(self) -> None:
        for module, name, value in reversed(self._before):
            setattr(module, name, value)


def _repeat(
    model: nn.Module, structure: Structure, own: Structure, layer: int, changes: _Changes
) -> None:
    """Repeat the rows of a layer's keys and values."""
    before, after = structure.widths.sizes(layer), own.widths.sizes(layer)
    for label in structure.labels(model, layer):
        path, _, name = label.name.rpartition(".")
        module = model.get_submodule(path)
        for place, dim in enumerate(label.dims):
            if dim.size(before) == dim.size(after):  # Q and O have rows for every head
                continue
            old = module.get_parameter(name)
            positions = _positions(dim, before).to(old.device)
            new = old.detach().index_select(place, positions)
            changes.set(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
            if "out_features" in vars(module):
                changes.set(module, "out_features", len(positions))


def _count(model: nn.Module, own: Structure, layer: int, changes: _Changes) -> None:
    """Tell attention that no heads share keys."""
    path = own.readers(model, "group", layer)[0].path.rpartition(".")[0]
    attention = model.get_submodule(path)
    known, heads = vars(attention), own.widths.layers[layer]["group"]
    if not any(name in known for name in (_SHARING, *_COUNTS)):
        raise UserError(
            f"expected attention with one of {', '.join((_SHARING, *_COUNTS))} to give each query "
            f"head keys of its own, got {type(attention).__name__}; cut channels only"
        )
    for name in _COUNTS:
        if name in known:
            changes.set(attention, name, heads)
    if _SHARING in known:
        changes.set(attention, _SHARING, 1)
    if own.family.one_group is not None:
        changes.set(attention, own.family.one_group, False)
    if "lit_prune_values" in known:  # where values begin behind keys in one module
        changes.set(attention, "lit_prune_values", known["lit_prune_values"])
        hook_values(model, own, layer)


def _positions(dim: Dim, sizes: Mapping[str, int]) -> Tensor:
    """Which entries make up a dimension in which each query head is a group of its own."""
    found, offset = [], 0
    for part in dim.parts if dim.kind == "sum" else (dim,):
        for group in range(sizes["group"]):
            for query in range(sizes["query"]):
                keep = {
                    "group": torch.tensor([group], device="cpu"),
                    "query": torch.tensor([[query]], device="cpu"),
                }
                found.append(part.positions(sizes, keep) + offset)
        offset += part.size(sizes)
    return torch.cat(found)
