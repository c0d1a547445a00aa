"""Loading exports without running code from their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lit_prune.errors import UserError
from lit_prune.export.modeling_lit_pruned import FORMAT, pruned_classes
from lit_prune.export.trial import stock_class, stock_config


def load_pruned(
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = "auto",
    attn_implementation: str | None = None,
) -> Any:
    """Load an export, stock or not, with this package's classes instead of the folder's file.

    Args:
        directory: A folder that `export_checkpoint` or the model's `save_pretrained` wrote.
        dtype: The parameters' dtype; "auto" or None for the checkpoint's.
        attn_implementation: transformers' name of it; None for the default.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: The folder holds no export, or a broken one.
    """
    folder = Path(directory)
    record = pruned_record(folder)
    options: dict[str, Any] = {"dtype": "auto" if dtype is None else dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if record is not None:
        config_class, model_class = _classes(folder, record)
        config = config_class.from_pretrained(folder)
        return load_checked(model_class.from_pretrained, folder, config=config, **options)
    content = _read_config(folder)
    if content.get("model_type") not in CONFIG_MAPPING or "auto_map" in content:
        raise UserError(
            f"expected an export of lit-prune or a model type of transformers in {folder}, "
            f"got {content.get('model_type')!r}; load it with lit_prune.PrunableLM instead"
        )
    return load_checked(AutoModelForCausalLM.from_pretrained, folder, **options)


def pruned_record(folder: Path) -> dict[str, Any] | None:
    """What config.json of an export that is not stock says of its cut, or None.

    Args:
        folder: A checkpoint folder.

    Raises:
        UserError: There is no readable config.json.
    """
    return _read_config(folder).get("lit_prune")


def load_pruned_config(folder: Path) -> Any:
    """The config of an export, stock or not; `config.lit_prune` holds the cut if it is not.

    Args:
        folder: A checkpoint folder.

    Raises:
        UserError: There is no readable config.json, or of another format.
    """
    record = pruned_record(folder)
    if record is None:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return _classes(folder, record)[0].from_pretrained(folder)


def build_pruned(folder: Path, **options: Any) -> Any:
    """Build an export with a modelling file, without its weights, in stock classes.

    Args:
        folder: A checkpoint folder with a `pruned_record`.
        options: Those of `from_config`.

    Raises:
        UserError: config.json is of another format.
    """
    record = pruned_record(folder)
    config_class, model_class = _classes(folder, record or {})
    return as_stock(model_class._from_config(config_class.from_pretrained(folder), **options))


def as_stock(model: Any) -> Any:
    """Give a loaded model the stock classes, as a model has them that was cut in memory.

    Its modules stay as they are; to save it, call `export_checkpoint`.

    Args:
        model: A model from `load_pruned`; changed in place.

    Returns:
        The same model.
    """
    model.__class__ = stock_class(type(model))
    plain: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            if id(config) not in plain:
                plain[id(config)] = (config, stock_config(config))  # kept, so that ids stay unique
            module.config = plain[id(config)][1]
    return model


def load_checked(load: Any, source: str | Path, **options: Any) -> Any:
    """Call a `from_pretrained` that must find every weight, in safetensors files.

    Args:
        load: The class's `from_pretrained`.
        source: Folder or hub id.
        options: Its other arguments.

    Returns:
        The model.

    Raises:
        UserError: Weights are missing, unreadable or of another shape.
    """
    options = {"trust_remote_code": False, "use_safetensors": True} | options
    try:
        model, info = load(str(source), output_loading_info=True, **options)
    except SafetensorError as error:
        raise UserError(
            f"expected whole safetensors files in {source}, got: {error}; copy them again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"expected weights of the sizes in config.json of {source}, got others; "
            f"the files are not of one checkpoint"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"expected every weight in the files of {source}, got none for {missing[0]} "
            f"({len(missing)} missing); is it a causal language model, and copied whole?"
        )
    return model


def _classes(folder: Path, record: dict[str, Any]) -> tuple[Any, Any]:
    base = str(record.get("base_model_type"))
    if record.get("version") != FORMAT or base not in CONFIG_MAPPING:
        raise UserError(
            f"expected an export of format {FORMAT} in {folder}, got format "
            f"{record.get('version')!r} of {base!r}; update lit-prune and transformers"
        )
    base_config = CONFIG_MAPPING[base]
    return pruned_classes(base_config, MODEL_FOR_CAUSAL_LM_MAPPING[base_config])


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"expected a checkpoint folder with a config.json, got {folder}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected JSON in {path}, got: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"expected a JSON object in {path}, got {type(content).__name__}")
    return content
