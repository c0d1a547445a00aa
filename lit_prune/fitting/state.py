"""What a checkpoint must hold so that its weights find a model of their shape."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from lit_prune.cutting.wholeness import require_whole
from lit_prune.dtypes import keeping_dtypes
from lit_prune.errors import UserError
from lit_prune.fitting.made_with import differences
from lit_prune.masks.bottleneck import Gates
from lit_prune.recovery import lora, teacher
from lit_prune.structure import Layout, Widths, cut, settle
from lit_prune.structure.biases import add_biases, biased
from lit_prune.structure.norms import norm_epsilon, set_norm_epsilon


def saved(module: Any) -> dict[str, Any]:
    """The state of a `Prunable` beside its weights, as plain types; none of one left half cut."""
    require_whole(module.model)
    return {
        "model_type": module.model.config.model_type,
        "digest": module._outside.get("digest"),
        "dtype": str(module.model.dtype).removeprefix("torch."),
        "layout": module.layout.to_dict(),
        "biases": biased(module.model, module.structure),
        "epsilon": norm_epsilon(module.model, module.structure),
        "phase": module.phase,
        "gates": None if module.gates is None else module.gates.spec,
        "adapter": module.adapter,
        "history": module.history,
        "seconds": module.seconds,
        "findings": module.findings,
        "first_step": module.first_step,
    }


def load(module: Any, state: Mapping[str, Any] | None) -> None:
    """Bring a dense `Prunable` into the shape that saved weights have.

    Args:
        module: The module, with its model.
        state: What `saved` gave, or None if a checkpoint has no such entry.

    Raises:
        UserError: The state is of another module or model.
    """
    if state is None:
        raise UserError(
            "expected a checkpoint of a Prunable module, got one of another module, or one whose "
            "on_save_checkpoint does not call super()"
        )
    layout = Layout.from_dict(state["layout"])
    is_cut = state["layout"] == module.layout.to_dict()  # by a fit of this very module
    fits = is_cut or layout.of == module.structure.widths
    if state["model_type"] != module.model.config.model_type or not fits:
        raise UserError(
            f"expected a checkpoint of {module.pretrained}, a {module.model.config.model_type} "
            f"model, got one of a {state['model_type']} model"
            f"{_apart(layout.of, module.structure.widths)}; give the model it was made from"
        )
    digests = (state.get("digest"), module._outside.get("digest"))
    if all(digests) and digests[0] != digests[1]:
        raise UserError(
            f"expected a checkpoint of {module.pretrained}, got one of a model of the same shape "
            "with other weights; give the model it was made from"
        )
    lora.remove_lora(module.model)  # of that fit
    with keeping_dtypes(module.model):
        module.model.to(getattr(torch, state["dtype"]))  # which the trainer may have chosen
    teacher.keep(module)
    dense = module._outside.setdefault("config", copy.deepcopy(module.model.config))
    if not is_cut:
        cut(module.model, module.structure, layout)
    if not is_cut or biased(module.model, module.structure) != state["biases"]:
        add_biases(module.model, state["biases"])
        set_norm_epsilon(module.model, module.structure, state["epsilon"])
        module.is_stock = settle(module.model, module.structure, layout, dense)
    module.gates = None
    if state["gates"] is not None:
        module.gates = Gates(module.structure.widths, **state["gates"])
    module.layout, module.adapter = layout, state["adapter"]
    for name in ("history", "seconds", "findings", "first_step"):
        setattr(module, name, state[name])
    if state["phase"] == "recovery":
        module.attach_adapter(**state["adapter"])
    module.phase, module.resumed = state["phase"], True


def _apart(old: Widths, new: Widths) -> str:
    found = differences(old.shared, new.shared)
    if len(old.layers) != len(new.layers):
        found.append(f"{len(old.layers)} layers (here {len(new.layers)})")
    else:
        for number, (one, other) in enumerate(zip(old.layers, new.layers, strict=True)):
            found += [f"{text} in layer {number}" for text in differences(one, other)]
    return f" with {', '.join(found[:3])}" + ", …" * (len(found) > 3) if found else ""
