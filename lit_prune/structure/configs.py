"""Configs of cut models: what the stock fields can say."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig

from lit_prune.structure.dims import parse
from lit_prune.structure.families import Family
from lit_prune.structure.layout import Widths

#: Config fields with an entry per layer, which follow the `layer` axis.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def rebuilt(config: Any, updates: dict[str, Any]) -> Any:
    """A copy of a config with other values, checked by its class as on loading.

    Raises:
        ValueError: The class refuses the values.
    """
    names = getattr(config, "attribute_map", {})
    values = config.to_dict() | {names.get(key, key): value for key, value in updates.items()}
    new = type(config).from_dict(values)
    new._attn_implementation = config._attn_implementation
    return new


def kept_layers_config(config: Any, kept: list[int]) -> Any:
    """The config with only some layers: their number, and the lists that have an entry a layer."""
    updates: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for key in PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == config.num_hidden_layers:
            updates[key] = [values[i] for i in kept]
    return rebuilt(config, updates)


def propose(
    config: Any, family: Family, widths: Widths, epsilon: float | None = None
) -> Any | None:
    """The stock config that may express some widths, or None if its fields surely can't.

    Args:
        config: The dense model's config, with the layers that are left.
        family: The table's entry, whose fields are filled in.
        widths: The cut model's widths.
        epsilon: That of its RMS norms; None leaves the config's.
    """
    if hasattr(config, "lit_prune") or not widths.layers:
        return None
    if any(sizes != widths.layers[0] for sizes in widths.layers):
        return None
    sizes = widths.sizes(0)
    if sizes["value"] != sizes["head_dim"]:
        return None
    updates = {
        field: parse(f"({dim})").writes.size(sizes)
        for dim, field in family.fields.items()
        if dim != "layer"
    }
    if epsilon is not None:
        updates[family.epsilon] = epsilon
    try:
        return rebuilt(config, updates)
    except (ValueError, TypeError, StrictDataclassError):  # refused sizes are not stock
        return None


def adopt(model: nn.Module, config: Any) -> None:
    """Make a config the model's, and that of every module that kept a reference to one."""
    for module in model.modules():
        if isinstance(vars(module).get("config"), PretrainedConfig):
            setattr(module, "config", config)  # noqa: B010 - the type of Module has no such name
