"""Settings of a training that a fit is started with, where it goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.dtypes import DTYPES
from lit_prune.errors import UserError


def settings(module: Any) -> dict[str, Any]:
    """What a `PrunableLM`'s training was asked to be like, as plain types for its checkpoints.

    The schedule's shape and warmup are no part of it: no checkpoint overrides them.
    """
    return {
        "learning_rate": module.optimization["lr"],
        "weight_decay": module.optimization["weight_decay"],
        "optimizer": module.optimizer_name,
        "dtype": module.dtype_name,
    }


def go_on(checkpoint: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put what a fit is started with into the checkpoint that it goes on from.

    Else the learning rate and weight decay would count that optimizers were saved with, unseen.
    Optimizers that are not the module's own, as while masks train, stay as they are.

    Args:
        checkpoint: Changed in place, if the two are not those it was made with. The weights' dtype
            stays, with a warning.
        new: As of `settings`.

    Raises:
        UserError: Another optimizer is asked for, which can't go on with the moments.
    """
    ours = checkpoint["lit_prune"]
    old = ours.get("training", new)
    if old["dtype"] != new["dtype"] and DTYPES[new["dtype"]] != getattr(torch, ours["dtype"]):
        rank_zero_warn(
            f"the checkpoint's weights stay {ours['dtype']}: dtype {old['dtype']} "
            f"(here {new['dtype']})"
        )
    if ours["gates"] is not None:
        return
    optimizers = checkpoint.get("optimizer_states", ())
    if optimizers and old["optimizer"] != new["optimizer"]:
        raise UserError(
            f"expected the optimizer that the checkpoint was made with, {old['optimizer']}, got "
            f"{new['optimizer']}, which can't go on with its moments; set it so, or start anew"
        )
    for optimizer in optimizers:
        for group in optimizer["param_groups"]:
            if group.get("weight_decay") == old["weight_decay"]:
                group["weight_decay"] = new["weight_decay"]
    if old["learning_rate"] != new["learning_rate"]:
        _change_rates(checkpoint, old["learning_rate"], new["learning_rate"])


def _change_rates(checkpoint: Mapping[str, Any], old: float, new: float) -> None:
    """Make `new` the peak of each learning rate that had `old` as its peak."""

    def changed(rate: float) -> float:
        return new if rate == old else new * (rate / old)

    for optimizer in checkpoint.get("optimizer_states", ()):
        for group in optimizer["param_groups"]:
            if group.get("initial_lr", group["lr"]) == old:
                group.update({k: changed(group[k]) for k in ("lr", "initial_lr") if k in group})
    for schedule in checkpoint.get("lr_schedulers", ()):
        for number, peak in enumerate(schedule.get("base_lrs", ())):
            if peak == old:
                schedule["base_lrs"][number] = new
                schedule["_last_lr"][number] = changed(schedule["_last_lr"][number])
