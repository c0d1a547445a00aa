"""Callbacks that prune, repair, export and report inside a Trainer."""

from lit_prune.callbacks.distillation import Distillation
from lit_prune.callbacks.export import ExportCheckpoint
from lit_prune.callbacks.fasp import FASPPruning
from lit_prune.callbacks.lora import LoRARecovery
from lit_prune.callbacks.random_state import RandomState
from lit_prune.callbacks.report import GainLossReport

__all__ = [
    "Distillation",
    "ExportCheckpoint",
    "FASPPruning",
    "GainLossReport",
    "LoRARecovery",
    "RandomState",
]
