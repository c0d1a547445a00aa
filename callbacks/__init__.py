"""Callbacks that prune, repair, export and report inside a Trainer."""

from lit_prune.callbacks.coupled import CoupledComponentPruning
from lit_prune.callbacks.distillation import Distillation
from lit_prune.callbacks.export import ExportCheckpoint
from lit_prune.callbacks.fasp import FASPPruning
from lit_prune.callbacks.fisher import FisherPruning
from lit_prune.callbacks.flap import FLAPPruning
from lit_prune.callbacks.fusion import AdaptiveFusionPruning
from lit_prune.callbacks.lora import LoRARecovery
from lit_prune.callbacks.magnitude import MagnitudePruning
from lit_prune.callbacks.random_pruning import RandomPruning
from lit_prune.callbacks.random_state import RandomState
from lit_prune.callbacks.report import GainLossReport
from lit_prune.callbacks.tasks import TaskEvaluation
from lit_prune.callbacks.taylor import TaylorPruning
from lit_prune.callbacks.vib import VIBPruning
from lit_prune.callbacks.wanda import WandaPruning
from lit_prune.callbacks.zeroth import ZerothOrderPruning

__all__ = [
    "AdaptiveFusionPruning",
    "CoupledComponentPruning",
    "Distillation",
    "ExportCheckpoint",
    "FASPPruning",
    "FLAPPruning",
    "FisherPruning",
    "GainLossReport",
    "LoRARecovery",
    "MagnitudePruning",
    "RandomPruning",
    "RandomState",
    "TaskEvaluation",
    "TaylorPruning",
    "VIBPruning",
    "WandaPruning",
    "ZerothOrderPruning",
]
