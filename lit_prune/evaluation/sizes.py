"""What a model's axes hold, and what is left after a cut: counted on a model, on meta perhaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lit_prune.allocation.plan import Plan
from lit_prune.modes import evaluating
from lit_prune.structure import Layout, Structure, Widths, cut, settle
from lit_prune.structure.counting import count, count_actual, count_macs, unique_labels
from lit_prune.structure.dims import PER_GROUP
from lit_prune.structure.model import Label

#: What one unit of an axis is.
UNITS = {
    "channel": "an FFN channel",
    "group": "a KV head with its query heads",
    "query": "a query head of every KV group",
    "value": "a value feature of every KV group",
    "hidden": "a residual feature",
    "layer": "a decoder layer",
}


def axis_sizes(model: nn.Module, structure: Structure, length: int) -> list[dict[str, Any]]:
    """What goes with each axis of a model.

    Args:
        model: The model; it may be on meta.
        structure: Its structure.
        length: Tokens in the context.

    Returns:
        For each axis `axis`, `unit` (what one is), `units` (in each layer, or a single number for
        an axis of the whole model), `unit_parameters` and `unit_macs` (per token; of one unit in
        each layer), `parameters` and `macs` (of all units), `decoder_share` (of the parameters).
    """
    counts = _Counts(model, structure, length)
    return [{"axis": axis, "unit": UNITS[axis], **counts.axis(axis)} for axis in structure.axes()]


def totals(model: Any, structure: Structure, length: int) -> dict[str, Any]:
    """A model's size as it is.

    Args:
        model: The model; it may be on meta.
        structure: Its structure.
        length: Tokens in the context.

    Returns:
        `decoder_parameters`, `parameters`, `macs_per_token` (of the last of `length` tokens),
        `weight_bytes`, and of keys and values `cache_bytes_per_token` and `cache_bytes` (of all
        `length`), None where a forward pass can't be tried.
    """
    return {
        "decoder_parameters": count_actual(model, structure, decoder=True),
        "parameters": count_actual(model, structure),
        "macs_per_token": count_macs(model, structure, structure.widths, attended(model, length)),
        "weight_bytes": weight_bytes(model),
        "cache_bytes_per_token": cache_bytes(model, 1),
        "cache_bytes": cache_bytes(model, length),
    }


class Cached(NamedTuple):
    """What a layer keeps of the tokens before.

    Attributes:
        token_bytes: Bytes of a token's keys and values.
        window: Tokens that attention looks at, the present one included; None for all.
    """

    token_bytes: int
    window: int | None


def cached(model: Any) -> list[Cached] | None:
    """What each layer keeps, found by running a token through.

    Args:
        model: The model; it may be on meta.

    Returns:
        An entry for each layer, or None where no forward pass can be tried on meta.
    """
    weight = model.get_input_embeddings().weight
    text = torch.zeros(1, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        with evaluating(model), torch.no_grad():
            cache = model(inputs_embeds=text, use_cache=True).past_key_values
    except RuntimeError:
        if not weight.is_meta:
            raise
        return None
    return [
        Cached(
            sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)),
            getattr(layer, "sliding_window", None),
        )
        for layer in cache.layers
    ]


def attended(model: Any, length: int) -> int | list[int]:
    """Tokens that attention looks at for the last of some: all, or a layer's window.

    Args:
        model: The model; it may be on meta.
        length: Tokens so far.

    Returns:
        A number for each layer, or `length` where it can't be tried.
    """
    found = cached(model)
    return length if found is None else [within(length, layer.window) for layer in found]


def cache_bytes(model: Any, length: int) -> int | None:
    """Bytes of keys and values that are kept after some tokens.

    Args:
        model: The model; it may be on meta.
        length: Tokens so far.

    Returns:
        The bytes, or None where it can't be tried.
    """
    found = cached(model)
    if found is None:
        return None
    # a window's oldest token is dropped before the next one comes
    kept = (within(length, layer.window and layer.window - 1) for layer in found)
    return sum(layer.token_bytes * tokens for layer, tokens in zip(found, kept, strict=True))


def within(tokens: int, most: int | None) -> int:
    """So many tokens, or the most that there may be."""
    return tokens if most is None else min(tokens, most)


def checkpoint_bytes(directory: str | Path) -> int:
    """Bytes of a checkpoint's weight files (`*.safetensors`)."""
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def expected(model: Any, structure: Structure, plan: Plan, length: int) -> dict[str, Any]:
    """Cut a model to a plan's widths and tell what is left; which units go makes no difference.

    Args:
        model: The model, cut in place; it may be on meta.
        structure: Its structure, which follows.
        plan: Units to remove from each layer.
        length: Tokens in the context.

    Returns:
        `sparsity` (`decoder` and `total`), `widths` (of each axis, in each layer), the `totals`,
        and `stock`: whether the family's own config can express the result.
    """
    before = totals(model, structure, length)
    layout = _first_units(structure.widths, plan)
    cut(model, structure, layout)
    stock = settle(model, structure, layout)
    after = totals(model, structure, length)
    removed = {
        "decoder": 1 - after["decoder_parameters"] / before["decoder_parameters"],
        "total": 1 - after["parameters"] / before["parameters"],
    }
    widths = {axis: [sizes[axis] for sizes in structure.widths.layers] for axis in plan.removed}
    return {"sparsity": removed, "widths": widths, **after, "stock": stock}


def reachable(
    labels: Sequence[Label], widths: Widths, axes: Sequence[str], protected: Sequence[int] = ()
) -> float:
    """The largest share of the decoder's parameters that can go; a unit of each axis stays.

    Args:
        labels: Labels of the model's parameters, each once.
        widths: Present sizes of its axes.
        axes: What may be cut.
        protected: Layers that stay whole.
    """
    least = widths.copy()
    for layer, sizes in enumerate(least.layers):
        if layer not in protected:
            sizes.update(dict.fromkeys(axes, 1))
    return 1 - count(labels, least, decoder=True) / count(labels, widths, decoder=True)


def _first_units(widths: Widths, plan: Plan) -> Layout:
    layout = Layout.full(widths)
    for layer, sizes in enumerate(widths.layers):
        left = {axis: sizes[axis] - removed[layer] for axis, removed in plan.removed.items()}
        groups = left.get("group", sizes["group"])
        keep = {axis: torch.arange(number, device="cpu") for axis, number in left.items()}
        for axis in keep.keys() & set(PER_GROUP):
            keep[axis] = keep[axis].expand(groups, -1)
        layout = layout.replace_layer(layer, keep)
    return layout


class _Counts:
    """Parameters and multiply-accumulates of a model at other widths than its own."""

    def __init__(self, model: nn.Module, structure: Structure, length: int) -> None:
        self.model, self.structure = model, structure
        self.seen = attended(model, length)
        self.labels = unique_labels(model, structure)
        self.parameters = count(self.labels, structure.widths)
        self.decoder = count(self.labels, structure.widths, decoder=True)
        self.macs = count_macs(model, structure, structure.widths, self.seen)

    def axis(self, axis: str) -> dict[str, Any]:
        """An axis' part of `axis_sizes`."""
        widths = self.structure.widths
        if axis == "layer":
            units, costs = [len(widths.layers)], self._each_layer(self._of_layer)
            parameters, macs, share = self.decoder, sum(macs for _, macs in costs), 1.0
        else:
            none = widths.copy()
            if axis == "hidden":
                units, costs = [widths.shared["hidden"]], [self._saved(_narrower(widths))]
                none.shared["hidden"] = 0
            else:
                units = [sizes[axis] for sizes in widths.layers]
                costs = self._each_layer(lambda i: self._saved(_narrower(widths, axis, i)))
                for sizes in none.layers:
                    sizes[axis] = 0
            parameters, macs = self._saved(none)
            share = 1 - count(self.labels, none, decoder=True) / self.decoder
        return {
            "units": units,
            "unit_parameters": [cost[0] for cost in costs],
            "unit_macs": [cost[1] for cost in costs],
            "parameters": parameters,
            "macs": macs,
            "decoder_share": share,
        }

    def _each_layer(self, cost: Callable[[int], tuple[int, int]]) -> list[tuple[int, int]]:
        """A cost in each layer; it is the same in layers of the same kind, so few are counted."""
        known: dict[Any, tuple[int, int]] = {}
        found = []
        for layer, sizes in enumerate(self.structure.widths.layers):
            kind = (*sizes.items(), *(label.dims for label in self._own(layer)))
            if kind not in known:
                known[kind] = cost(layer)
            found.append(known[kind])
        return found

    def _of_layer(self, layer: int) -> tuple[int, int]:
        empty = self.structure.widths.copy()
        empty.layers[layer] = dict.fromkeys(empty.layers[layer], 0)
        # norms are as wide as the residual stream, so a layer's parameters are counted apart
        return count(self._own(layer), self.structure.widths), self._saved(empty)[1]

    def _own(self, layer: int) -> list[Label]:
        return [label for label in self.labels if label.layer == layer]

    def _saved(self, widths: Widths) -> tuple[int, int]:
        """Parameters and MACs that go when the model gets other widths."""
        macs = count_macs(self.model, self.structure, widths, self.seen)
        return self.parameters - count(self.labels, widths), self.macs - macs


def _narrower(widths: Widths, axis: str = "hidden", layer: int | None = None) -> Widths:
    """Widths with a unit less."""
    less = widths.copy()
    sizes = less.shared if layer is None else less.layers[layer]
    sizes[axis] -= 1
    return less
