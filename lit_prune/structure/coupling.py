"""The tensors of a layer by the part they play, whatever module a family keeps them in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.structure.dims import Dim
from lit_prune.structure.model import Site, Structure

#: The parts that a unit of each axis owns.
ROLES = {
    "channel": ("gate", "up", "down"),
    "group": ("query", "key", "value", "output"),
    "query": ("query", "output"),
    "value": ("value", "output"),
}


@dataclass(frozen=True)
class Block:
    """Entries of one dimension that play one part.

    Attributes:
        names: The axes of the entries, slowest first.
        positions: Flat index of each entry along the dimension, with one dimension an axis.
    """

    names: tuple[str, ...]
    positions: Tensor


def blocks(dim: Dim, sizes: Mapping[str, int]) -> list[Block]:
    """Take a dimension apart along its sums and numbers, such as ``(group 3 head_dim)`` in three.

    Args:
        dim: The dimension.
        sizes: Size of each axis.

    Returns:
        Its blocks, first to last.
    """
    if dim.kind == "name":
        return [Block((dim.name,), torch.arange(sizes[dim.name], device="cpu"))]
    if dim.kind == "number":
        return [Block((), torch.tensor(i, device="cpu")) for i in range(dim.number)]
    if dim.kind == "sum":
        found, offset = [], 0
        for part in dim.parts:
            found += [Block(b.names, b.positions + offset) for b in blocks(part, sizes)]
            offset += part.size(sizes)
        return found
    found = [Block((), torch.tensor(0, device="cpu"))]
    for part in dim.parts:
        size, inner = part.size(sizes), blocks(part, sizes)
        found = [_join(a, b, size) for a in found for b in inner]
    return found


def _join(outer: Block, inner: Block, size: int) -> Block:
    shape = outer.positions.shape + (1,) * inner.positions.dim()
    return Block(outer.names + inner.names, outer.positions.reshape(shape) * size + inner.positions)


@dataclass(frozen=True)
class Part:
    """Where a role's rows lie.

    Attributes:
        role: For example ``key``.
        path: The module.
        positions: Index of each row along the module's dimension, [units...].
        reads: Whether the rows are columns of the module's matrix (O, down).
    """

    role: str
    path: str
    positions: Tensor
    reads: bool


def parts(model: nn.Module, structure: Structure, layer: int) -> list[Part]:
    """Where a layer keeps its queries, keys, values, outputs and FFN channels.

    Raises:
        ValueError: The table's lines don't name three attention inputs, or one or two for channels.
    """
    sizes = structure.widths.sizes(layer)
    found = _writers(model, structure, layer, "group", ("query", "key", "value"), sizes)
    found += _writers(model, structure, layer, "channel", ("gate", "up"), sizes)
    for axis, role in (("group", "output"), ("channel", "down")):
        site = structure.readers(model, axis, layer)[0]
        if site.line.reads is None:
            raise TypeError(f"expected {site.path} to read an axis")
        (block,) = blocks(site.line.reads, sizes)
        found.append(Part(role, site.path, _shaped(block, role, sizes), True))
    return found


def _writers(
    model: nn.Module,
    structure: Structure,
    layer: int,
    axis: str,
    roles: tuple[str, ...],
    sizes: Mapping[str, int],
) -> list[Part]:
    found: list[tuple[Site, Block]] = [
        (site, block)
        for site in structure.sites(model, layer)
        if site.line.reads is not None and axis in site.line.writes
        for block in blocks(site.line.writes, sizes)
    ]
    if axis == "channel" and len(found) == 1:
        roles = roles[1:]
    if len(found) != len(roles):
        raise ValueError(f"expected writers of {', '.join(roles)}, got {len(found)} in a layer")
    return [
        Part(role, site.path, _shaped(block, role, sizes), False)
        for role, (site, block) in zip(roles, found, strict=True)
    ]


def _shaped(block: Block, role: str, sizes: Mapping[str, int]) -> Tensor:
    """Give queries and outputs their dimension of heads in a group where a family has one each."""
    if role in ("query", "output") and "query" not in block.names:
        if sizes["query"] != 1:
            raise ValueError(f"expected one query head a group, got {sizes['query']}")
        return block.positions.unsqueeze(1)
    return block.positions


def names_of(model: nn.Module, structure: Structure, layer: int) -> list[str]:
    """The parameters that units of a layer own entries of: matrices, and the biases of rows."""
    return parameter_names(model, parts(model, structure, layer))


def parameter_names(model: nn.Module, found: Iterable[Part]) -> list[str]:
    """The parameters that parts lie in: matrices, and the biases of rows."""
    names: dict[str, None] = {}
    for part in found:
        names[f"{part.path}.weight"] = None
        if not part.reads and getattr(model.get_submodule(part.path), "bias", None) is not None:
            names[f"{part.path}.bias"] = None
    return list(names)


def view(
    model: nn.Module,
    structure: Structure,
    layer: int,
    tensors: Mapping[str, Tensor],
    known: list[Part] | None = None,
) -> dict[str, Tensor]:
    """Rows of a layer's matrices by role.

    With G KV groups of q query heads, k entries of keys and v of values, and d on the other side:
    ``query`` [G, q, k, d], ``key`` [G, k, d], ``value`` [G, v, d], ``output`` [G, q, v, d] (columns
    of O), ``gate`` and ``up`` [channels, d] (no gate without one), ``down`` [channels, d] (columns
    of down). A bias is appended to its row, which then has d + 1 entries. The rest are views, where
    rows lie together.

    Args:
        model: The model; it only says where things lie.
        structure: Its structure.
        layer: The layer.
        tensors: Weights or gradients, by parameter name.
        known: What `parts` gave, to save finding it again.
    """
    result = {}
    for part in known or parts(model, structure, layer):
        matrix = tensors[f"{part.path}.weight"]
        transposed = isinstance(model.get_submodule(part.path), Conv1D)
        if part.reads != transposed:
            matrix = matrix.T
        rows = _rows(matrix, part.positions)
        bias = None if part.reads else tensors.get(f"{part.path}.bias")
        if bias is not None:
            rows = torch.cat([rows, _rows(bias, part.positions).unsqueeze(-1)], -1)
        result[part.role] = rows
    return result


def _rows(matrix: Tensor, positions: Tensor) -> Tensor:
    """Rows in the shape of their positions; a view if they lie together."""
    flat = positions.flatten()
    first = int(flat[0])
    if torch.equal(flat, torch.arange(first, first + len(flat), device="cpu")):
        rows = matrix[first : first + len(flat)]
    else:
        rows = matrix[flat.to(matrix.device)]
    return rows.unflatten(0, positions.shape)


def per_unit(rows: Mapping[str, Tensor], axis: str) -> dict[str, Tensor]:
    """What each unit of an axis owns of each role.

    Args:
        rows: As of `view`.
        axis: ``channel``, ``group``, ``query`` or ``value``.

    Returns:
        role -> [units, entries], or [groups, units, entries] for `query` and `value`.
    """
    found = {}
    for role in ROLES[axis]:
        if role not in rows:
            continue
        tensor = rows[role]
        if axis == "value" and role == "output":
            tensor = tensor.transpose(1, 2)
        found[role] = tensor.flatten(2 if axis in ("query", "value") else 1)
    return found
