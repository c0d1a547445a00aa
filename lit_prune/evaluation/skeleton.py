"""Models without their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lit_prune.export.load import build_pruned
from lit_prune.loading.pretrained import load_config, resolve
from lit_prune.loading.source_errors import said_in_one_line
from lit_prune.structure import Structure, Widths
from lit_prune.structure.families import find_family


def skeleton(source: str, access: Mapping[str, bool] | None = None) -> tuple[Structure, Any]:
    """A model as its config describes it, on meta: no weights are read or made.

    Args:
        source: See `lit_prune.loading.pretrained.load_pretrained`.
        access: Its `trust_remote_code` and `token`.

    Returns:
        The structure, with the widths of an export that was cut, and the model in the config's
        dtype.

    Raises:
        UserError: The source can't be found, read, reached or used.
    """
    config = load_config(source, **(access or {}))
    find_family(config)
    place = resolve(source)
    with said_in_one_line(source):
        if not place.pruned:
            return Structure.of_config(config)
        widths = config.lit_prune["layout"]["widths"]
        with torch.device("meta"):
            model = build_pruned(Path(place.place))
        return Structure.of(model, Widths(widths["shared"], widths["layers"])), model
