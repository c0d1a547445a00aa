"""Writing a cut model as a Hugging Face checkpoint that loads without this project."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from lit_prune.cutting.wholeness import require_whole
from lit_prune.errors import UserError
from lit_prune.export import modeling_lit_pruned as pruned
from lit_prune.export.trial import compare, differences, stock_class, stock_config, stock_trial
from lit_prune.files import folder_errors, written_at_once

#: Our own file in an export; config.json of a stock export stays stock.
LINEAGE_FILE = "lit_prune.json"


def export_checkpoint(
    model: Any,
    tokenizer: Any,
    out: str | Path,
    *,
    config: Any,
    layout: dict[str, Any],
    lineage: list[Any],
    card: str,
    max_shard_size: int | str = "5GB",
) -> bool:
    """Write a folder that `from_pretrained` loads, at once or not at all.

    Everything is written to a folder beside `out`, which is renamed when it is complete; an
    earlier export at `out` is replaced then.

    Args:
        model: A causal language model of transformers, cut in place; adapters merged.
        tokenizer: Its tokenizer, saved with its chat template, or None.
        out: The folder to make.
        config: The stock config proposed for the model, or None if there is none.
        layout: What is left of the dense model, as plain types.
        lineage: What was done to it, step by step, as plain types.
        card: Text of its README.md.
        max_shard_size: Size at which the weights are split into several files.

    Returns:
        Whether the checkpoint is stock. If not, it carries a modelling file of its own.

    Raises:
        UserError: There is no room, no permission, `out` holds something else, or the model was
            left half cut.
    """
    require_whole(model)
    with export_folder(model, out) as folder:
        return write_export(
            model,
            tokenizer,
            folder,
            config=config,
            layout=layout,
            lineage=lineage,
            card=card,
            max_shard_size=max_shard_size,
        )


@contextmanager
def export_folder(model: Any, out: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place if nothing is raised.

    Args:
        model: What will be written, on meta perhaps; there must be room for its parameters.
        out: The folder to make; an earlier export is replaced.

    Raises:
        UserError: There is no room, no permission, or `out` holds something else.
    """
    out = Path(out).resolve()
    with folder_errors(out):
        check_destination(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with written_at_once(out) as folder:
            _check_room(model, out.parent)
            yield folder


def write_export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    config: Any,
    layout: dict[str, Any],
    lineage: list[Any],
    card: str,
    max_shard_size: int | str = "5GB",
    weights: bool = True,
) -> bool:
    """Write the files of an export; see `export_checkpoint`.

    Args:
        model: The model; on meta if its weights are not written here.
        tokenizer: Its tokenizer or None.
        folder: An empty folder.
        config: The stock config proposed for the model, or None.
        layout: What is left of the dense model.
        lineage: What was done to it.
        card: Text of its README.md.
        max_shard_size: Size at which the weights are split into several files.
        weights: Whether to write them.

    Returns:
        Whether the checkpoint is stock.
    """
    stock = config is not None and not differences(model, config)
    twin = stock_trial(model, config) if stock else _pruned_trial(model, layout)
    _save_model(model, twin, folder, max_shard_size, weights)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    _write_lineage(folder, stock=stock, layout=layout, lineage=lineage)
    return stock


def read_lineage(directory: str | Path) -> dict[str, Any]:
    """Read what an export says about itself.

    Args:
        directory: A checkpoint folder.

    Returns:
        `stock`, `layout`, `lineage` and `versions` as written; an empty lineage and no layout for
        a checkpoint that is not an export.

    Raises:
        UserError: The file can't be read.
    """
    path = Path(directory) / LINEAGE_FILE
    if not path.is_file():
        return {"version": pruned.FORMAT, "stock": True, "layout": None, "lineage": []}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"expected JSON in {path}, got {error}; export the model again") from error


def _write_lineage(
    folder: Path, *, stock: bool, layout: dict[str, Any], lineage: list[Any]
) -> None:
    from lit_prune import __version__

    versions = {
        "lit_prune": __version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    content = {
        "version": pruned.FORMAT,
        "stock": stock,
        "layout": layout,
        "lineage": lineage,
        "versions": versions,
    }
    (folder / LINEAGE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _pruned_trial(model: Any, layout: dict[str, Any]) -> Any:
    """Build on meta what the modelling file makes of the checkpoint; it must equal the model."""
    base_model, base_config = stock_class(type(model)), stock_class(type(model.config))
    if getattr(transformers, base_model.__name__, None) is not base_model:
        raise UserError(
            f"expected a model class of transformers for a layout that its config can't express, "
            f"got {base_model.__name__} with code of its own; choose a stock layout"
        )
    found = compare(model, stock_trial(model, model.config))
    if found.other:
        raise RuntimeError(
            f"expected a model that differs from {base_model.__name__} in sizes only, "
            f"got: {'; '.join(found.other[:3])}; merge adapters and remove wrappers first"
        )
    config_class, model_class = pruned.pruned_classes(base_config, base_model)
    config = stock_config(model.config)
    config.__class__ = config_class
    config.lit_prune = {
        "version": pruned.FORMAT,
        "base_model_type": base_config.model_type,
        "layout": layout,
        "shapes": found.shapes,
        "attributes": found.attributes,
    }
    # as a reader gets it: through JSON
    read = config_class.from_dict(json.loads(config.to_json_string(use_diff=True)))
    read._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        twin = model_class._from_config(read, dtype=model.dtype)
    if left := compare(model, twin).lines():
        raise RuntimeError(f"the modelling file can't express the model: {'; '.join(left[:3])}")
    return twin


def _save_model(
    model: Any, twin: Any, folder: Path, max_shard_size: int | str, weights: bool
) -> None:
    """Save through the twin: same tensors, but the config and class that a reader will have."""
    twin.load_state_dict(model.state_dict(), strict=True, assign=True)
    twin.tie_weights()
    twin.generation_config = _valid_generation_config(model)
    twin.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=None if weights else {})


def _valid_generation_config(model: Any) -> Any:
    """The model's generation config in a state that transformers agrees to save.

    Published ones often carry a temperature with `do_sample` off, which is refused.
    """
    config = copy.deepcopy(model.generation_config)
    config._name_or_path = ""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    return config


def check_destination(out: Path) -> None:
    """Refuse a place for an export that holds something other than an earlier one.

    Args:
        out: The folder to make.

    Raises:
        UserError: There is a file, or a folder with other files.
    """
    if out.is_dir():
        if any(out.iterdir()) and not (out / LINEAGE_FILE).is_file():
            raise UserError(
                f"expected a new folder or an earlier export at {out}, got a folder with "
                f"other files; choose another one"
            )
    elif out.exists():
        raise UserError(f"expected a folder at {out}, got a file; choose another name")


def _check_room(model: Any, parent: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"expected {needed / 1e6:.0f} MB of free disk space for the checkpoint at {parent}, "
            f"got {free / 1e6:.0f} MB; free some or choose another folder"
        )
