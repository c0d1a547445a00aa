"""What is left of a model: its widths, and which units of the dense model they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_prune.structure.dims import PER_GROUP


@dataclass
class Widths:
    """Sizes of a model's axes.

    Attributes:
        shared: Sizes that all layers share: ``hidden``, ``vocab``, ``head_dim``, ….
        layers: Sizes of each layer: ``channel``, ``group``, ``query``, ``value``.
            The numbers may be tensors, for expected sizes that are differentiated.
    """

    shared: dict[str, Any]
    layers: list[dict[str, Any]]

    def sizes(self, layer: int | None = None) -> dict[str, Any]:
        """All sizes that hold within one layer, or outside of the layers for None."""
        return {**self.shared, **(self.layers[layer] if layer is not None else {})}

    def uniform(self, axis: str) -> int | None:
        """The size of an axis if all layers have the same, else None."""
        found = {layer[axis] for layer in self.layers}
        return found.pop() if len(found) == 1 else None

    def copy(self) -> Widths:
        """A copy that can be changed without changing this one."""
        return Widths(dict(self.shared), [dict(layer) for layer in self.layers])


@dataclass(frozen=True)
class LayerUnits:
    """The units that are left in one layer.

    Attributes:
        source: The layer's number in the model that the layout refers to.
        keep: Ascending kept units of each axis, [kept], or [kept groups, kept] for `query` and
            `value`. An axis that is missing keeps all.
    """

    source: int
    keep: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """The units that are left of a model, in the numbering of the model it refers to.

    Attributes:
        of: Widths of the model that the numbers refer to.
        hidden: Kept residual features [kept], or None for all.
        layers: The layers that are left, in order.
    """

    of: Widths
    hidden: Tensor | None
    layers: tuple[LayerUnits, ...]

    @classmethod
    def full(cls, widths: Widths) -> Layout:
        """The layout in which nothing is cut."""
        return cls(widths.copy(), None, tuple(LayerUnits(i) for i in range(len(widths.layers))))

    def replace_layer(self, source: int, keep: Mapping[str, Tensor]) -> Layout:
        """The same layout with other units kept in one layer."""
        layers = tuple(
            LayerUnits(source, dict(keep)) if unit.source == source else unit
            for unit in self.layers
        )
        return Layout(self.of, self.hidden, layers)

    def widths(self) -> Widths:
        """Sizes of the model that is left."""
        shared = dict(self.of.shared)
        if self.hidden is not None:
            shared["hidden"] = len(self.hidden)
        layers = []
        for unit in self.layers:
            sizes = dict(self.of.layers[unit.source])
            sizes.update({axis: kept.shape[-1] for axis, kept in unit.keep.items()})
            layers.append(sizes)
        return Widths(shared, layers)

    def then(self, step: Layout) -> Layout:
        """Join two cuts: this one, then a step that refers to what this one left."""
        layers = []
        for unit in step.layers:
            first, sizes = self.layers[unit.source], self.of.layers[self.layers[unit.source].source]
            keep = dict(first.keep)
            for axis in sizes:
                joined = _join(axis, first.keep, unit.keep, sizes)
                if joined is not None:
                    keep[axis] = joined
            layers.append(LayerUnits(first.source, keep))
        hidden = step.hidden
        if self.hidden is not None:
            hidden = self.hidden if step.hidden is None else self.hidden[step.hidden]
        return Layout(self.of, hidden, tuple(layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain types for a checkpoint or JSON; index lists as ranges, ``0-3,7``."""
        layers = []
        for unit in self.layers:
            keep = {
                axis: [ranges(row) for row in kept.tolist()]
                if axis in PER_GROUP
                else ranges(kept.tolist())
                for axis, kept in sorted(unit.keep.items())
            }
            layers.append({"source": unit.source, **keep})
        widths = self.widths()
        return {
            "of": {"shared": dict(self.of.shared), "layers": [dict(x) for x in self.of.layers]},
            "hidden": None if self.hidden is None else ranges(self.hidden.tolist()),
            "layers": layers,
            "widths": {"shared": widths.shared, "layers": widths.layers},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layout:
        """The inverse of `to_dict`."""
        layers = []
        for entry in data["layers"]:
            keep = {
                axis: _indices([unranges(row) for row in kept])
                if axis in PER_GROUP
                else _indices(unranges(kept))
                for axis, kept in entry.items()
                if axis != "source"
            }
            layers.append(LayerUnits(entry["source"], keep))
        hidden = None if data["hidden"] is None else _indices(unranges(data["hidden"]))
        of = Widths(dict(data["of"]["shared"]), [dict(x) for x in data["of"]["layers"]])
        return cls(of, hidden, tuple(layers))


def _indices(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")


def _join(
    axis: str, first: Mapping[str, Tensor], step: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> Tensor | None:
    if axis not in PER_GROUP:
        if axis not in step:
            return first.get(axis)
        return first[axis][step[axis]] if axis in first else step[axis]
    if axis not in step and "group" not in step:
        return first.get(axis)
    groups = len(first["group"]) if "group" in first else sizes["group"]
    before = first.get(axis)
    if before is None:
        if axis not in step:
            return None
        before = torch.arange(sizes[axis], device="cpu").expand(groups, -1)
    if "group" in step:
        before = before[step["group"]]
    return before.gather(1, step[axis]) if axis in step else before


def ranges(indices: Iterable[int]) -> str:
    """Write ascending integers as ranges: ``[0, 1, 2, 7]`` is ``0-2,7``."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in parts)


def unranges(text: str) -> Sequence[int]:
    """The inverse of `ranges`."""
    result: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        result.extend(range(int(first), int(last or first) + 1))
    return result
