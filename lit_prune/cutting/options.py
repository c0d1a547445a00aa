"""What is asked of pruning: what makes no sense, alone or for a model, and what is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_prune.cutting.layerwise import Repair, Ridge
from lit_prune.errors import UserError, require_one_of
from lit_prune.fitting.made_with import defaults_of
from lit_prune.prunable import Prunable
from lit_prune.structure.limits import require_axes, require_stock

if TYPE_CHECKING:
    from lit_prune.pruning import PruningCallback

AxisName = Literal["channel", "group", "query", "value", "hidden"]
Allocation = Literal["uniform", "global", "sensitivity"]
RelativeTo = Literal["decoder", "total"]

#: The least that a number may be.
_LEAST = {"multiple": 0, "seed": 0, "samples": 1, "length": 2, "batch_size": 1}


def check_options(callback: PruningCallback) -> None:
    """Refuse options that no model could be pruned with, or that would not count.

    Args:
        callback: Has them.

    Raises:
        UserError: One of them.
    """
    require_one_of("allocation", callback.allocation, Allocation)
    require_one_of("relative_to", callback.relative_to, RelativeTo)
    _check_how_much(callback)
    _check_restoration(callback)
    for name in ("axes", "protected_layers"):
        given = getattr(callback, name)
        if twice := [value for value in given if given.count(value) > 1]:
            raise UserError(f"expected each of {name} once, got {twice[0]} twice; leave out one")
    for name, bound in _LEAST.items():
        if getattr(callback, name) < bound:
            raise UserError(f"expected {name} of at least {bound}, got {getattr(callback, name)}")
    unknown = [axis for axis in callback.axes if axis not in callback.known_axes]
    if unknown or not callback.axes:
        raise UserError(
            f"expected axes out of {', '.join(callback.known_axes)} for {callback.method}, got "
            f"{unknown[0] if unknown else 'none'}; choose among those"
        )
    if callback.multiple and not {"channel", "hidden"} & set(callback.axes):
        raise UserError(
            "expected channel or hidden, which are rounded to a multiple, among the axes, got "
            f"multiple {callback.multiple} and {' and '.join(callback.axes)}; set multiple to 0"
        )
    if callback.allocation == "sensitivity" and callback.samples % callback.batch_size:
        raise UserError(
            "expected whole batches for the sensitivity allocation, which sets some aside, got "
            f"{callback.samples} samples in batches of {callback.batch_size}; make samples a "
            "multiple of it"
        )


def _check_how_much(callback: PruningCallback) -> None:
    ratio = callback.per_layer_ratio
    asked = callback.sparsity if ratio is None else ratio
    if not 0 <= asked < 1:
        raise UserError(f"expected a sparsity from 0 to below 1, got {asked:g}")
    if ratio is not None and (callback.allocation, callback.relative_to) != ("uniform", "decoder"):
        raise UserError(
            "expected per_layer_ratio with the uniform allocation and relative_to decoder, since "
            f"it is what each layer gives, got {callback.allocation} and {callback.relative_to}; "
            "choose a sparsity instead"
        )


def _check_restoration(callback: PruningCallback) -> None:
    how = callback.restoration
    require_one_of("restoration", how.kind, Repair)
    require_one_of("ridge", how.ridge, Ridge)
    if not how.delta > 0:
        raise UserError(f"expected a delta above 0, got {how.delta:g}")
    if how.kind != "least_squares" and (how.ridge, how.delta) != (type(how).ridge, type(how).delta):
        raise UserError(
            f"expected restoration least_squares for ridge and delta, got {how.kind} with "
            f"{how.ridge} and {how.delta:g}; leave them out or choose it"
        )
    if how.kind == "unit_scales" and "hidden" in callback.axes:
        raise UserError(
            "expected another restoration where hidden is cut, got unit_scales, which compares "
            "with the dense stream; choose least_squares or none"
        )


def check_model(callback: PruningCallback, pl_module: Prunable) -> None:
    """Refuse options that do not suit the method or the model.

    Args:
        callback: Has them.
        pl_module: Has the model.

    Raises:
        UserError: One of them.
    """
    structure, model_type = pl_module.structure, pl_module.model.config.model_type
    require_axes(model_type, structure.axes(), callback.axes)
    _check_smoothing(callback)
    _warn_of_unused(callback)
    if not pl_module.stock:
        return
    require_stock(model_type, structure.family, structure.widths, callback.axes)
    if "hidden" in callback.axes:
        raise UserError(
            "expected axes under --stock that any config can express, got 'hidden', whose size "
            "must often suit the number of heads; leave out --stock or the axis"
        )
    if callback.allocation != "uniform":
        raise UserError(
            "expected the uniform allocation under --stock, since one config number holds the "
            f"width of all layers, got {callback.allocation}; leave out one of the two"
        )
    if callback.restoration.kind == "bias":
        _check_biases(callback, pl_module)


def _check_biases(callback: PruningCallback, pl_module: Prunable) -> None:
    model, structure = pl_module.model, pl_module.structure
    for axis in callback.axes:
        path = structure.readers(model, axis, 0)[0].path
        if getattr(model.get_submodule(path), "bias", None) is None:
            raise UserError(
                "expected another restoration under --stock, since the config of "
                f"{model.config.model_type} has no bias for {path}, got bias; choose "
                "least_squares, or leave out --stock"
            )


def _check_smoothing(callback: PruningCallback) -> None:
    if not callback.smoothing:
        return
    if callback.looks_at != "batches":
        raise UserError(
            "expected a method whose score comes batch by batch for smoothing, got "
            f"{callback.method}; leave out smoothing"
        )
    if callback.standardised:
        raise UserError(
            "expected a method with scores of at least 0 for smoothing, which weighs them by their "
            f"uncertainty, got {callback.method}, whose are standardised; leave out smoothing"
        )
    if callback.scores_while_cutting:
        raise UserError(
            "expected scores before the cut for smoothing, got those of "
            f"{callback.method} with the {callback.allocation} allocation, which come layer by "
            "layer while it cuts; choose the global allocation or leave out smoothing"
        )


def _warn_of_unused(callback: PruningCallback) -> None:
    """Not an error: methods are compared with the same calibration asked of each."""
    usual = defaults_of(type(callback))
    names = ("samples", "length", "batch_size")
    given = [name for name in names if getattr(callback, name) != usual[name]]
    if given and not callback.needs_data:
        rank_zero_warn(
            f"{callback.method} looks at no calibration tokens, so that {' and '.join(given)} "
            "do not count"
        )


def reported(callback: PruningCallback) -> dict[str, Any]:
    """What all methods are asked for, as plain types; not what does not count.

    Args:
        callback: Has the options.
    """
    how = callback.restoration
    found: dict[str, Any] = {
        "axes": list(callback.axes),
        "allocation": callback.allocation,
        "restoration": how.kind,
        "protected_layers": callback.protected_layers,
    }
    if callback.needs_data:
        found["calibration"] = f"{callback.samples} x {callback.length} tokens"
        found["batch_size"] = callback.batch_size
    if how.kind == "least_squares":
        found |= {"ridge": how.ridge, "delta": how.delta}
    if callback.relative_to != "decoder":
        found |= {"relative_to": callback.relative_to, "sparsity": callback.sparsity}
    for name in ("per_layer_ratio", "multiple", "smoothing", "seed"):
        if getattr(callback, name):
            found[name] = getattr(callback, name)
    return found
