"""Cutting: the same units out of every tensor that carries them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import UserError
from lit_prune.export.modeling_lit_pruned import keep_heads, narrow_values
from lit_prune.structure.configs import adopt, kept_layers_config, propose
from lit_prune.structure.dims import Dim, members, parse
from lit_prune.structure.layout import Layout
from lit_prune.structure.model import Structure
from lit_prune.structure.norms import NormRescale, kept_shares, norm_epsilon, rescale

#: Sizes that modules of a layer remember under these names.
_REMEMBERED = {
    "num_heads": "(group query)",
    "num_attention_heads": "(group query)",
    "num_key_value_heads": "group",
    "num_kv_heads": "group",
    "num_key_value_groups": "query",
    "split_size": "(group query head_dim)",
    "intermediate_size": "channel",
    "hidden_size": "hidden",
    "embed_dim": "hidden",
}
_REMEMBERED_DIMS = {name: parse(text).writes for name, text in _REMEMBERED.items()}
#: Outside of the layers only these follow: a model's head count stays that of its ALiBi table.
_REMEMBERED_OUTSIDE = ("hidden_size", "embed_dim")


def cut(
    model: nn.Module,
    structure: Structure,
    layout: Layout,
    norm_rescale: NormRescale = "masked",
    energies: Mapping[str, Tensor] | None = None,
) -> None:
    """Cut a model in place down to a layout; `structure` then describes what is left.

    Masking the removed units and cutting them give the same logits, up to rounding; when `hidden`
    is cut, norms are rescaled so that this holds for RMS norms, unless told otherwise (a
    LayerNorm's statistics are taken over the features that are left). `settle` then completes the
    result: until it is called, the config still lists the layers that were cut.

    Args:
        model: A Hugging Face causal language model.
        structure: Its structure; its widths are updated.
        layout: What stays, in the model's present numbering.
        norm_rescale: What RMS norms do when `hidden` is cut; see `norms.rescale`.
        energies: Of this very model, as of `norms.energies`; needed for `calibrated` only.

    Raises:
        UserError: The family has no such axis, or energies are missing; if energies are, nothing
            is cut.
    """
    before, shares = structure.widths.copy(), {}
    if layout.hidden is not None:
        shares = kept_shares(model, structure, layout.hidden, norm_rescale, energies)
    for unit in layout.layers:
        if unit.keep:
            cut_layer(model, structure, unit.source, unit.keep)
    if layout.hidden is not None:
        for layer in [None, *range(len(structure.widths.layers))]:
            _select(model, structure, layer, {"hidden": layout.hidden})
        structure.widths.shared["hidden"] = len(layout.hidden)
        for layer in [None, *range(len(structure.widths.layers))]:
            _remember(model, structure, layer)
        rescale(model, structure, before.shared["hidden"], norm_rescale, shares)
    kept = [unit.source for unit in layout.layers]
    if kept != list(range(len(before.layers))):
        _keep_layers(model, structure, kept)


def cut_layer(
    model: nn.Module, structure: Structure, layer: int, keep: Mapping[str, Tensor]
) -> None:
    """Cut units of one layer in place; see `cut`.

    Args:
        model: The model.
        structure: Its structure; the layer's widths are updated.
        layer: The layer's present number.
        keep: Kept units of some of the layer's axes.

    Raises:
        UserError: The family has no such axis in its layers.
    """
    config: Any = model.config
    possible = [axis for axis in structure.axes() if axis not in {"hidden", "layer"}]
    for axis in keep:
        if axis not in possible:
            raise UserError(
                f"expected axes that layers of {config.model_type} have ({', '.join(possible)}), "
                f"got {axis!r}; choose one of those"
            )
    sizes = structure.widths.sizes(layer)
    _select(model, structure, layer, keep)
    for axis, kept in keep.items():
        structure.widths.layers[layer][axis] = kept.shape[-1]
    _remember(model, structure, layer)
    hook_values(model, structure, layer)
    if "group" not in keep and "query" not in keep:
        return
    if structure.family.has_alibi(config):
        heads = members("group", sizes, keep)[:, None].expand(-1, sizes["query"])
        if "query" in keep:
            heads = members("query", sizes, keep)
        attention = model.get_submodule(_attention_path(model, structure, layer))
        keep_heads(
            attention, heads.flatten().nonzero().flatten().tolist(), config.num_attention_heads
        )
    own_config(model, structure, layer)


def settle(model: nn.Module, structure: Structure, layout: Layout, dense: Any = None) -> bool:
    """Give a cut model the config that it will be saved with.

    That is a stock config where the stock class built from it has exactly the cut model's shapes
    and sizes, which is tried; else the dense widths' config with the layers that are left.

    Args:
        model: The cut model.
        structure: Its structure.
        layout: The last cut, in the numbering of the model before it; all cuts where `dense` is
            given.
        dense: The config before any cut, so that the result does not depend on how many there were;
            the model's own if there was one.

    Returns:
        Whether the result is stock.
    """
    from lit_prune.export.trial import differences

    config: Any = model.config if dense is None else dense
    fallback = kept_layers_config(config, [unit.source for unit in layout.layers])
    epsilon = norm_epsilon(model, structure)
    candidate = propose(fallback, structure.family, structure.widths, epsilon)
    if candidate is not None:
        adopt(model, candidate)
        if not differences(model, candidate):
            return True
    adopt(model, fallback)
    for layer in range(len(structure.widths.layers)):
        own_config(model, structure, layer)
    return False


def own_config(model: nn.Module, structure: Structure, layer: int) -> None:
    """Give a layer's attention its own config where its forward pass reads sizes from it."""
    family, sizes = structure.family, structure.widths.sizes(layer)
    wanted = {key: parse(dim).writes.size(sizes) for key, dim in _grouped(family.reads_config)}
    config: Any = model.config
    if all(getattr(config, key) == value for key, value in wanted.items()):
        return
    attention: Any = model.get_submodule(_attention_path(model, structure, layer))
    attention.config = copy.copy(config)
    for key, value in wanted.items():
        setattr(attention.config, key, value)


def _grouped(fields: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(key, f"({text})") for key, text in fields.items()]


def _attention_path(model: nn.Module, structure: Structure, layer: int) -> str:
    return structure.readers(model, "group", layer)[0].path.rpartition(".")[0]


def hook_values(model: nn.Module, structure: Structure, layer: int) -> None:
    """Hook a layer's attention where its values are narrower than its keys."""
    sizes = structure.widths.sizes(layer)
    if sizes["value"] == sizes["head_dim"] or "value" not in structure.axes():
        return
    path = _attention_path(model, structure, layer)
    (writer,) = (s for s in structure.sites(model, layer) if "value" in s.line.writes)
    (reader,) = structure.readers(model, "value", layer)
    writes = writer.line.writes
    segments = writes.parts if writes.kind == "sum" else (writes,)
    narrow_values(
        model.get_submodule(path),
        writer=writer.path.removeprefix(f"{path}."),
        reader=reader.path.removeprefix(f"{path}."),
        before=sum(part.size(sizes) for part in segments[:-1]),
        value=sizes["value"],
        head_dim=sizes["head_dim"],
    )


def _select(
    model: nn.Module, structure: Structure, layer: int | None, keep: Mapping[str, Tensor]
) -> None:
    """Index every parameter of a layer, or of the modules outside the layers for None."""
    sizes, done = structure.widths.sizes(layer), {}
    positions: dict[Dim, Tensor] = {}
    for label in structure.labels(model, layer):
        if label.layer != layer:
            continue
        path, _, name = label.name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(name)
        if id(old) not in done:
            value, chosen = old.detach(), False
            for place, dim in enumerate(label.dims):
                if any(axis in keep for axis in dim.names()):
                    if dim not in positions:
                        positions[dim] = dim.positions(sizes, keep).to(old.device)
                    value = value.index_select(place, positions[dim])
                    chosen = True
            if not chosen:
                continue
            # `old` is kept alive with the new one, so that its id stays taken
            done[id(old)] = (old, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
        setattr(module, name, done[id(old)][1])
        _remember_shape(module)


def _remember_shape(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def _remember(model: nn.Module, structure: Structure, layer: int | None) -> None:
    """Update the sizes that modules keep as attributes."""
    sizes = structure.widths.sizes(layer)
    if layer is None:
        modules = [m for name, m in model.named_modules() if structure.layers_path not in name]
        names = _REMEMBERED_OUTSIDE
    else:
        modules = list(structure.layers(model)[layer].modules())
        names = tuple(_REMEMBERED)
    for module in modules:
        for name in names:
            if type(vars(module).get(name)) is int:
                setattr(module, name, _REMEMBERED_DIMS[name].size(sizes))


def _keep_layers(model: nn.Module, structure: Structure, kept: list[int]) -> None:
    layers = structure.layers(model)
    parent, _, name = structure.layers_path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers[i] for i in kept))
    structure.widths.layers = [structure.widths.layers[i] for i in kept]
    for number, layer in enumerate(structure.layers(model)):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                # where its keys and values lie in the cache
                setattr(module, "layer_idx", number)  # noqa: B010 - the type has no such name
