"""Adapters as folders in peft's format: written, and read without unpickling anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.files import folder_errors, written_at_once
from lit_prune.recovery.lora import NAME, PEFT_PREFIX, adapter_state, has_lora, lora_layers

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: Kinds of LoRA that are more than W + s B A with one s, and what their fields say without them.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


@dataclass(frozen=True)
class Adapter:
    """An adapter as it was read.

    Attributes:
        rank: Rows of A, in every layer.
        alpha: Scale times rank.
        targets: Paths of the layers.
        state: `<layer>.lora_A.weight` [rank, in] and `<layer>.lora_B.weight` [out, rank] of each.
    """

    rank: int
    alpha: float
    targets: list[str]
    state: dict[str, Tensor]


def read_adapter(directory: str | Path) -> Adapter:
    """Read a folder as `save_adapter` or peft writes it, safetensors only.

    Args:
        directory: The folder.

    Raises:
        UserError: It holds no such adapter, or one that is more than plain LoRA of one rank.
    """
    folder = Path(directory).expanduser()
    config = _read_config(folder)
    if not (folder / _WEIGHTS).is_file():
        raise UserError(
            f"expected an adapter's {_WEIGHTS} in {folder}, got none; pickled adapters are not "
            "read, save it anew with peft's safe_serialization"
        )
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"expected whole safetensors in {folder / _WEIGHTS}, got {error}"
        ) from error
    state = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    rank, targets = config["r"], []
    for key, value in state.items():
        path, _, factor = key.rpartition(".lora_")
        ranks = {"A.weight": 0, "B.weight": 1}
        partner = f"{path}.lora_{'B' if factor[:1] == 'A' else 'A'}.weight"
        if factor not in ranks or partner not in state or value.ndim != 2:
            raise UserError(f"expected pairs of LoRA's A and B in {folder}, got {key} alone")
        if value.shape[ranks[factor]] != rank:
            raise UserError(
                f"expected an adapter of rank {rank}, as {_CONFIG} says, got "
                f"{value.shape[ranks[factor]]} at {path}"
            )
        if factor == "A.weight":
            targets.append(path)
    return Adapter(rank, float(config["lora_alpha"]), targets, state)


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, if it is of plain LoRA."""
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        known = isinstance(config["r"], int) and isinstance(config["lora_alpha"], int | float)
    except (OSError, ValueError, KeyError, TypeError):
        known, config = False, {}
    if not known:
        raise UserError(
            f"expected a peft adapter's folder with {_CONFIG}, its r and lora_alpha, got {folder}"
        )
    for name, plain in _PLAIN.items():
        if (found := config.get(name, plain)) not in (plain, None):
            raise UserError(
                f"expected a plain LoRA adapter in {folder}, got one with {name} {found!r}; "
                "merge it into the model that it was trained on instead"
            )
    return config


def save_adapter(model: nn.Module, directory: str | Path, *, base: str | None = None) -> None:
    """Write the adapter as a folder that `peft.PeftModel.from_pretrained(model, dir)` loads.

    Written under a temporary name and moved; safetensors only.

    Args:
        model: A model with LoRA.
        directory: The folder to make.
        base: Name of the model it belongs to, for adapter_config.json.

    Raises:
        UserError: The model has no LoRA, the folder exists and isn't empty, or there is no room.
    """
    target = Path(directory)
    if not has_lora(model):
        raise UserError("expected a model with LoRA to save its adapter, got one without")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"expected a new folder, got {target}, which exists; choose another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with folder_errors(target), written_at_once(target) as folder:
        _write_adapter(model, folder, base)


def _write_adapter(model: nn.Module, directory: Path, base: str | None) -> None:
    """adapter_model.safetensors and adapter_config.json, in peft's names."""
    state = adapter_state(model)
    tensors = {PEFT_PREFIX + key: value.cpu().contiguous() for key, value in state.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    attached = cast(dict[str, LoraConfig], model.peft_config)[NAME]
    config = LoraConfig(
        r=attached.r,
        lora_alpha=attached.lora_alpha,
        lora_dropout=attached.lora_dropout,
        target_modules=sorted(path for path, _ in lora_layers(model)),
        fan_in_fan_out=attached.fan_in_fan_out,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # peft keeps the targets as a set, whose order changes from run to run.
    config.target_modules = sorted(config.target_modules or ())
    config.save_pretrained(str(directory))
