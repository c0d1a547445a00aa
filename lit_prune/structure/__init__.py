"""What can be cut: named dimensions, the table of families, layouts, cutting, counting, masks."""

from lit_prune.structure.cut import cut, cut_layer, settle
from lit_prune.structure.families import known_types
from lit_prune.structure.layout import LayerUnits, Layout, Widths
from lit_prune.structure.model import AXES, Structure

__all__ = [
    "AXES",
    "LayerUnits",
    "Layout",
    "Structure",
    "Widths",
    "cut",
    "cut_layer",
    "known_types",
    "settle",
]
