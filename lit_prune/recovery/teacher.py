"""The dense model that a pruned one is compared with and taught by."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_prune.dtypes import keeping_dtypes
from lit_prune.errors import UserError
from lit_prune.loading.opening import load_dense
from lit_prune.recovery.quantized import Precision, QuantizedLinear


def keep(module: Any) -> None:
    """Copy a `Prunable`'s model before its first cut, if the copy is wanted and missing."""
    if not module.keep_teacher or module.teacher is not None or module.phase != "dense":
        return
    # layers that shall be quantized never get a dense copy
    small = dict(_quantized(module, module.model, module.teacher_precision))
    copied = {id(module.model.get_submodule(path)): layer for path, layer in small.items()}
    _hold(module, copy.deepcopy(module.model, copied), module.teacher_precision)


def require(module: Any, precision: Precision = "dense") -> nn.Module:
    """The dense model on the module's device, loaded again where that is needed.

    Args:
        module: A `Prunable`.
        precision: How the weights of its layers shall be held; one held in another way is let go.

    Raises:
        UserError: The model was given in memory and is cut, and no such copy was kept.
    """
    keep(module)
    held = module._outside.get("teacher_precision")
    if held != precision and "given" in module._outside:
        how = "" if precision == "dense" else f" in {precision}"
        raise UserError(
            f"expected the dense model to be at hand{how}, got a model given in memory that was "
            "cut without such a copy; set keep_teacher = True on the module before the fit"
        )
    if held != precision:
        module._outside.pop("teacher", None)
        model, _ = load_dense(module)
        with keeping_dtypes(model):  # quantized are the weights that the student was cut from
            model.to(module.model.dtype)
        for path, layer in _quantized(module, model, precision):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
        _hold(module, model, precision)
    teacher = module.teacher
    with keeping_dtypes(teacher):  # the trainer may have cast the student
        return teacher.to(module.device, module.model.dtype)


def _hold(module: Any, model: nn.Module, precision: Precision) -> None:
    model.eval().requires_grad_(False)
    module._outside.update(teacher=model, teacher_precision=precision)


def _quantized(module: Any, model: nn.Module, precision: Precision) -> Any:
    """Yield path and replacement of the decoder layers' linear modules, one by one."""
    for path, linear in list(model.named_modules()) if precision != "dense" else ():
        inside = path.startswith(f"{module.structure.layers_path}.")
        if inside and isinstance(linear, (nn.Linear, Conv1D)):
            yield path, QuantizedLinear(linear, precision, keep=False)
