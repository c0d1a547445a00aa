"""Masks: the removed units' activations set to zero, as a reference for cutting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.structure.layout import Layout
from lit_prune.structure.model import Site, Structure


@contextmanager
def masked(model: nn.Module, structure: Structure, layout: Layout) -> Iterator[None]:
    """Within the context the dense model computes what the cut model will.

    Units of a layer are zeroed where they are read (the inputs of O and down), residual features
    where they are written, a LayerNorm's statistics are taken over the kept features, and a
    removed layer passes its input on.

    Args:
        model: The dense model.
        structure: Its structure.
        layout: What stays.
    """
    handles = []
    kept = {unit.source: unit.keep for unit in layout.layers}
    for site in structure.sites(model):
        module = model.get_submodule(site.path)
        keep = dict(kept.get(site.layer, {})) if site.layer is not None else {}
        if site.line.reads is not None and any(axis in keep for axis in site.line.reads.names()):
            mask = site.line.reads.mask(structure.widths.sizes(site.layer), keep)
            handles.append(module.register_forward_pre_hook(_InputMask(mask)))
        if layout.hidden is not None and "hidden" in site.line.writes:
            handles.append(module.register_forward_hook(_output_mask(structure, site, layout)))
    for number, layer in enumerate(structure.layers(model)):
        if number not in kept:
            handles.append(layer.register_forward_hook(_pass_on, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _InputMask:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.mask.to(args[0].device, args[0].dtype), *args[1:])


def _output_mask(structure: Structure, site: Site, layout: Layout) -> Any:
    keep = {"hidden": layout.hidden}
    mask = site.line.writes.mask(structure.widths.sizes(site.layer), keep)  # pyright: ignore[reportArgumentType]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        m = mask.to(output.device)
        if isinstance(module, nn.LayerNorm):
            part = args[0][..., m]
            output = torch.zeros_like(output)
            output[..., m] = nn.functional.layer_norm(
                part, part.shape[-1:], module.weight[m], module.bias[m], module.eps
            )
        return output * m.to(output.dtype)

    return hook


def _pass_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    stream = args[0] if args else kwargs["hidden_states"]
    return (stream, *output[1:]) if isinstance(output, tuple) else stream
