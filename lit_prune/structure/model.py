"""The structure of a model: every parameter's dimensions, read from the table of families."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.structure.dims import Dim, Line, parse
from lit_prune.structure.families import Family, find_family
from lit_prune.structure.layout import Widths

#: What can be cut, in the order in which it is shown.
AXES = ("channel", "group", "query", "value", "hidden", "layer")


@dataclass(frozen=True)
class Label:
    """A parameter's dimensions.

    Attributes:
        name: The parameter's name in the model.
        dims: The dimension of each of its tensor dimensions.
        layer: The decoder layer it stands in, or None.
    """

    name: str
    dims: tuple[Dim, ...]
    layer: int | None


@dataclass(frozen=True)
class Site:
    """A module of the table in a model.

    Attributes:
        path: The module's path.
        line: What it reads and writes.
        layer: The decoder layer it stands in, or None.
    """

    path: str
    line: Line
    layer: int | None


class Structure:
    """Where each axis of a model lies, and how wide it is.

    Args:
        family: The model's entry in the table.
        widths: The sizes of its axes.
    """

    def __init__(self, family: Family, widths: Widths) -> None:
        self.family = family
        self.widths = widths
        self.lines: list[tuple[str, Line]] = []
        for text in filter(None, map(str.strip, family.modules.splitlines())):
            path, _, line = text.partition(" ")
            self.lines.append((path, parse(line)))
        inner = next(path for path, _ in self.lines if ".*." in path)
        self.layers_path = inner.partition(".*.")[0]

    @classmethod
    def of(cls, model: nn.Module, widths: Widths | None = None) -> Structure:
        """Read a Hugging Face causal language model's structure.

        Args:
            model: The model.
            widths: Its widths, where its config does not tell them, as after a cut.

        Raises:
            UserError: The family is unknown, or a parameter is not in the table or has another
                shape than the table says.
        """
        config: Any = model.config
        family = find_family(config)
        structure = cls(family, (widths or read_widths(config, family)).copy())
        structure.check(model)
        return structure

    @classmethod
    def of_config(cls, config: Any) -> tuple[Structure, nn.Module]:
        """The structure of a config's model, built on meta: no weights are needed or made."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return cls.of(model), model

    def sites(self, model: nn.Module, layer: int | None = None) -> Iterator[Site]:
        """Yield the modules of the table that the model has, or those of one layer."""
        for path, line in self.lines:
            if ".*." not in path:
                if layer is None and _has(model, path):
                    yield Site(path, line, None)
                continue
            numbers = range(len(self.widths.layers)) if layer is None else [layer]
            for number in numbers:
                full = path.replace("*", str(number), 1)
                if _has(model, full):
                    yield Site(full, line, number)

    def readers(self, model: nn.Module, axis: str, layer: int) -> list[Site]:
        """The modules of a layer whose input carries an axis."""
        return [
            site
            for site in self.sites(model, layer)
            if site.line.reads is not None and axis in site.line.reads
        ]

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The model's decoder layers."""
        found = model.get_submodule(self.layers_path)
        if not isinstance(found, nn.ModuleList):
            raise TypeError(f"expected {self.layers_path} to be a ModuleList, got {type(found)}")
        return found

    def axes(self) -> list[str]:
        """The axes that the family's table can cut, `layer` included."""
        written = {name for _, line in self.lines for name in line.writes.names()}
        return [axis for axis in AXES if axis == "layer" or axis in written]

    def labels(self, model: nn.Module, layer: int | None = None) -> list[Label]:
        """The dimensions of the table's parameters, tied ones under each of their names.

        Args:
            model: The model.
            layer: Only this layer's.
        """
        result = []
        for site in self.sites(model, layer):
            module = model.get_submodule(site.path)
            reads, writes = site.line.reads, site.line.writes
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 1:
                    dims: tuple[Dim, ...] = (writes,)
                elif reads is None:
                    raise UserError(f"expected {site.path}.{name} to have one dimension")
                elif isinstance(module, (Conv1D, nn.Embedding)):
                    dims = (reads, writes)
                else:
                    dims = (writes, reads)
                result.append(Label(f"{site.path}.{name}", dims, site.layer))
        return result

    def check(self, model: nn.Module) -> None:
        """Hold that every parameter is labelled and has the shape that its label says.

        Raises:
            UserError: One is not, or has not.
        """
        labels = {label.name: label for label in self.labels(model)}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in labels:
                raise UserError(
                    f"expected every parameter to be in the table of families, got {name} of "
                    f"{type(model).__name__}; add its module to lit_prune/structure/families.py"
                )
            label = labels[name]
            sizes = self.widths.sizes(label.layer)
            expected = tuple(dim.size(sizes) for dim in label.dims)
            if expected != tuple(parameter.shape):
                raise UserError(
                    f"expected {name} to be {expected} by the config, got {tuple(parameter.shape)}"
                )


def _has(model: nn.Module, path: str) -> bool:
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def read_widths(config: Any, family: Family) -> Widths:
    """Read the sizes of a model's axes from its config, or from our own export's layout."""

    def field(key: str) -> int | None:
        return getattr(config, family.fields[key], None) if key in family.fields else None

    hidden = config.hidden_size
    heads = config.num_attention_heads
    head_dim = field("head_dim") or hidden // heads
    group = family.constants.get("group") or field("group") or heads
    shared = {"hidden": hidden, "vocab": config.vocab_size, "head_dim": head_dim}
    for key in ("position", "embedding"):
        if key in family.fields:
            shared[key] = getattr(config, family.fields[key])
    layer = {
        "channel": field("channel") or 4 * hidden,
        "group": group,
        "query": heads // group,
        "value": head_dim,
    }
    own = getattr(config, "lit_prune", None)
    if isinstance(own, dict):
        widths = own["layout"]["widths"]
        return Widths(
            {**shared, **widths["shared"]}, [{**layer, **sizes} for sizes in widths["layers"]]
        )
    return Widths(shared, [dict(layer) for _ in range(config.num_hidden_layers)])
