"""Checkpoints of cut models: stock ones, or with a small modelling file."""

from lit_prune.export.checkpoint import check_destination, export_checkpoint, read_lineage
from lit_prune.export.load import as_stock, load_pruned
from lit_prune.export.trial import differences

__all__ = [
    "as_stock",
    "check_destination",
    "differences",
    "export_checkpoint",
    "load_pruned",
    "read_lineage",
]
