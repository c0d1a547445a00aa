"""Adapters on a `Prunable`: which modules get one, and putting them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError
from lit_prune.recovery import lora
from lit_prune.recovery.adapter_files import Adapter, read_adapter
from lit_prune.recovery.quantized import check_precision


def check(module: Any, options: Mapping[str, Any]) -> None:
    """Refuse what `attach` would refuse, as far as it can be known before a cut.

    Args:
        module: A `Prunable`.
        options: As for `attach`.

    Raises:
        UserError: An option is out of range, no module has a wanted name, the adapter to start
            from can't be read, or bitsandbytes is needed and not installed.
    """
    _choose(module, *_resolved(options))


def attach(module: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Attach LoRA to linear modules of the decoder layers and freeze the rest.

    Args:
        module: A `Prunable`.
        options: `rank`, `alpha`, `dropout`, `dtype` (a name) and `seed` as for
            `lit_prune.recovery.lora.attach_lora`; `targets` are names or paths of modules, empty
            for all; `base` is how the frozen layers under LoRA are held; `adapter` is a peft folder
            to start from, whose rank, alpha and targets then count, or None.

    Returns:
        The options with which such adapters are attached again, before weights are loaded.

    Raises:
        UserError: As for `check`, or the adapter to start from doesn't fit the model.
    """
    options, start = _resolved(options)
    chosen = _choose(module, options, start)
    dtype = DTYPES[options["dtype"]] or module.model.dtype
    if start is not None:
        lora.check_adapter(module.model, start.state)
    ranges = {name: options[name] for name in ("rank", "alpha", "dropout", "seed")}
    lora.attach_lora(module.model, targets=chosen, dtype=dtype, **ranges)
    if start is not None:
        _load(module.model, start)
    lora.quantize_base(module.model, options["base"])
    # written out, since "auto" may mean another when this is read
    return {**options, "dtype": str(dtype).removeprefix("torch.")}


def _resolved(options: Mapping[str, Any]) -> tuple[dict[str, Any], Adapter | None]:
    """The options, those of the adapter to start from among them, and that adapter."""
    resolved: dict[str, Any] = {"base": "dense", "adapter": None, **options}
    check_precision(resolved["base"])
    if resolved["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"expected the adapters' dtype out of {known}, got {resolved['dtype']!r}")
    if resolved["adapter"] is None:
        return resolved, None
    start = read_adapter(resolved["adapter"])
    own = {"rank": start.rank, "alpha": start.alpha, "targets": start.targets, "adapter": None}
    return {**resolved, **own}, start


def _choose(module: Any, options: Mapping[str, Any], start: Adapter | None) -> list[str]:
    """The paths of the modules that get an adapter."""
    wanted = set(options["targets"])
    paths = [
        site.path
        for site in module.structure.sites(module.model)
        if site.layer is not None and site.line.reads is not None
    ]
    names = {path: path.rpartition(".")[2] for path in paths}
    chosen = [path for path in paths if not wanted or {path, names[path]} & wanted]
    if start is not None and (missing := sorted(wanted - set(chosen))):
        raise UserError(
            f"expected an adapter of this model's layers, got one with {missing[0]}; use the model "
            "the adapter was trained on"
        )
    if unknown := sorted(wanted - {*paths, *names.values()}):
        known = ", ".join(sorted(set(names.values())))
        raise UserError(f"expected LoRA targets out of {known}, got {unknown[0]}; choose of those")
    ranges = {name: options[name] for name in ("rank", "alpha", "dropout")}
    lora.check_lora(module.model, targets=chosen, **ranges)
    return chosen


@torch.no_grad()
def _load(model: Any, start: Adapter) -> None:
    """Put an adapter's weights into LoRA that is attached, in the dtype that this has."""
    for key, tensor in lora.adapter_state(model).items():
        tensor.copy_(start.state[key])
