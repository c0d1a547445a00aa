"""What --stock refuses from the table alone is what a trial finds not to be stock."""

from __future__ import annotations

import pytest
import torch

from lit_prune.errors import UserError
from lit_prune.structure import Layout, Structure, cut, settle
from lit_prune.structure.dims import PER_GROUP
from lit_prune.structure.limits import require_axes, require_stock
from tests.structure.tiny import FAMILIES, tiny_config


@pytest.mark.parametrize("name", FAMILIES)
def test_refused_is_what_is_not_stock(name: str) -> None:
    config = tiny_config(name)
    for axis in ("channel", "group", "query", "value"):
        structure, model = Structure.of_config(config)
        widths = structure.widths
        if axis not in structure.axes() or widths.layers[0][axis] < 2:
            continue
        refused = ""
        try:
            require_stock(config.model_type, structure.family, widths, [axis])
        except UserError as error:
            refused = str(error)
        assert not refused or (repr(axis) in refused and config.model_type in refused)
        layout = Layout.full(widths)
        for layer, sizes in enumerate(widths.layers):
            kept = torch.arange(sizes[axis] - 1)
            keep = {axis: kept.expand(sizes["group"], -1) if axis in PER_GROUP else kept}
            layout = layout.replace_layer(layer, keep)
        cut(model, structure, layout)
        assert settle(model, structure, layout) is (not refused), axis


def test_widths_that_differ() -> None:
    structure, _ = Structure.of_config(tiny_config("llama"))
    widths = structure.widths.copy()
    widths.layers[1]["channel"] -= 5
    with pytest.raises(UserError, match=r"same channel width in every layer .* got 15 to 20"):
        require_stock("llama", structure.family, widths, ["group"])
    require_stock("llama", structure.family, structure.widths, ["group"])


def test_values_that_are_narrower_than_keys() -> None:
    structure, _ = Structure.of_config(tiny_config("llama"))
    widths = structure.widths.copy()
    for sizes in widths.layers:
        sizes["value"] = 5
    with pytest.raises(UserError, match=r"as wide as keys under --stock, 8 features .* got 5"):
        require_stock("llama", structure.family, widths, ["channel"])


def test_axes_that_are_not_there() -> None:
    require_axes("gpt2", ["channel", "group"], ["group"])
    with pytest.raises(UserError, match=r"gpt2 can cut \(channel, group\), got 'query'"):
        require_axes("gpt2", ["channel", "group"], ["channel", "query"])
