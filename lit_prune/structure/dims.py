"""Named dimensions: the small language in which a family's modules are described.

A line names the dimensions of a module in the direction the data flows::

    hidden -> (group query head_dim) + (group head_dim) + (group head_dim)

Parentheses join factors into one dimension, slowest first, as in einops; ``+`` joins segments one
after the other; a number is a factor that is never cut. A norm has a single dimension and no arrow.

Indices are kept on the CPU, whatever device is the default while a model is cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Axes whose units are counted within each KV group: their kept units are a [groups, kept] table.
PER_GROUP = ("query", "value")

_TOKEN = re.compile(r"\s*(->|[()+]|\d+|[a-z_]+)")


@dataclass(frozen=True)
class Dim:
    """One dimension of a tensor: a name, a number, a product of factors or a sum of segments.

    Attributes:
        kind: ``name``, ``number``, ``product`` or ``sum``.
        name: The axis, for a name.
        number: The size, for a number.
        parts: The factors or segments.
    """

    kind: str
    name: str = ""
    number: int = 0
    parts: tuple[Dim, ...] = ()

    def names(self) -> Iterator[str]:
        """Yield every axis that the dimension carries, repeated as often as it stands there."""
        if self.kind == "name":
            yield self.name
        for part in self.parts:
            yield from part.names()

    def __contains__(self, axis: str) -> bool:
        """Whether the dimension carries an axis."""
        return axis in self.names()

    def size(self, sizes: Mapping[str, Any]) -> Any:
        """Number of entries at given axis sizes.

        Args:
            sizes: Size of each axis; numbers or tensors (then the result is differentiable).
        """
        if self.kind == "name":
            return sizes[self.name]
        if self.kind == "number":
            return self.number
        values = [part.size(sizes) for part in self.parts]
        return math.prod(values) if self.kind == "product" else sum(values)

    def coordinates(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Coordinate of each entry along each axis.

        Args:
            sizes: Size of each axis.

        Returns:
            For each axis an int64 tensor [entries]; -1 where an entry does not lie on the axis.
        """
        if self.kind == "name":
            return {self.name: torch.arange(sizes[self.name], device="cpu")}
        if self.kind == "number":
            return {}
        parts = [(part.size(sizes), part.coordinates(sizes)) for part in self.parts]
        axes = dict.fromkeys(self.names())
        if self.kind == "sum":
            return {
                axis: torch.cat(
                    [grid.get(axis, torch.full((n,), -1, device="cpu")) for n, grid in parts]
                )
                for axis in axes
            }
        total, done, result = self.size(sizes), 1, {}
        for n, grid in parts:
            rest = total // (done * n)
            for axis, index in grid.items():
                result[axis] = index.repeat_interleave(rest).repeat(done)
            done *= n
        return result

    def mask(self, sizes: Mapping[str, int], keep: Mapping[str, Tensor]) -> Tensor:
        """Which entries stay when only some units of each axis are kept.

        Args:
            sizes: Size of each axis.
            keep: Kept units of some axes, ascending: [kept], or [kept groups, kept] for `query`
                and `value`, whose rows belong to the kept groups.

        Returns:
            A boolean tensor [entries].
        """
        grid = self.coordinates(sizes)
        mask = torch.ones(self.size(sizes), dtype=torch.bool, device="cpu")
        for axis, index in grid.items():
            if axis not in keep:
                continue
            member = members(axis, sizes, keep)
            if axis in PER_GROUP:
                group = grid.get("group", torch.zeros_like(index))
                stays = member[group.clamp(min=0), index.clamp(min=0)]
            else:
                stays = member[index.clamp(min=0)]
            mask &= stays | (index < 0)
        return mask

    def positions(self, sizes: Mapping[str, int], keep: Mapping[str, Tensor]) -> Tensor:
        """Flat indices of the entries that stay, ascending; see `mask`."""
        return self.mask(sizes, keep).nonzero().flatten()

    def reduce(self, values: Tensor, axis: str, sizes: Mapping[str, int]) -> Tensor:
        """Sum a value per entry over everything but one axis.

        Args:
            values: [entries].
            axis: The axis whose units remain.
            sizes: Size of each axis.

        Returns:
            [units], or [groups, units] for `query` and `value`.
        """
        grid = self.coordinates(sizes)
        index, on_axis = grid[axis], grid[axis] >= 0
        shape: tuple[int, ...] = (sizes[axis],)
        if axis in PER_GROUP:
            index = grid["group"].clamp(min=0) * sizes[axis] + index
            shape = (sizes["group"], sizes[axis])
        total = values.new_zeros(math.prod(shape))
        return total.index_add(0, index[on_axis], values[on_axis]).view(shape)


def members(axis: str, sizes: Mapping[str, int], keep: Mapping[str, Tensor]) -> Tensor:
    """Which units of an axis are kept, as booleans.

    Returns:
        [units], or [groups, units] for `query` and `value` (no unit of a group that goes is kept).
    """
    if axis not in PER_GROUP:
        member = torch.zeros(sizes[axis], dtype=torch.bool, device="cpu")
        member[keep[axis]] = True
        return member
    groups = keep.get("group")
    if groups is None:
        groups = torch.arange(sizes["group"], device="cpu")
    member = torch.zeros(sizes["group"], sizes[axis], dtype=torch.bool, device="cpu")
    member[groups[:, None], keep[axis]] = True
    return member


@dataclass(frozen=True)
class Line:
    """Dimensions of a module: what it reads (None for a norm) and what it writes."""

    reads: Dim | None
    writes: Dim


def parse(text: str) -> Line:
    """Parse one line of the language.

    Args:
        text: For example ``hidden -> (group 3 head_dim)`` or, for a norm, ``hidden``.

    Raises:
        ValueError: The text is not of the language; the message has the place.
    """
    tokens, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if not match:
            raise ValueError(f"expected a name, a number, (, ), + or -> at {text[place:]!r}")
        tokens.append(match[1])
        place = match.end()
    tokens.append("")
    first = _sum(tokens)
    if tokens[0] == "":
        return Line(None, first)
    if tokens.pop(0) != "->":
        raise ValueError(f"expected -> or the end in {text!r}")
    second = _sum(tokens)
    if tokens[0] != "":
        raise ValueError(f"expected the end before {tokens[0]!r} in {text!r}")
    return Line(first, second)


def _sum(tokens: list[str]) -> Dim:
    parts = [_product(tokens)]
    while tokens[0] == "+":
        tokens.pop(0)
        parts.append(_product(tokens))
    return parts[0] if len(parts) == 1 else Dim("sum", parts=tuple(parts))


def _product(tokens: list[str]) -> Dim:
    parts = []
    while tokens[0] not in {"", ")", "+", "->"}:
        token = tokens.pop(0)
        if token == "(":
            parts.append(_sum(tokens))
            if tokens[0] != ")":
                raise ValueError(f"expected ) before {tokens[0] or 'the end'!r}")
            tokens.pop(0)
        elif token.isdigit():
            parts.append(Dim("number", number=int(token)))
        else:
            parts.append(Dim("name", name=token))
    if not parts:
        raise ValueError(f"expected a name, a number or ( before {tokens[0] or 'the end'!r}")
    return parts[0] if len(parts) == 1 else Dim("product", parts=tuple(parts))
