"""How many units go from each layer in a cut, by what a callback was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_prune.allocation.plan import Plan, require_reachable, uniform
from lit_prune.allocation.ranking import Scores, aligned, ranked, require_near
from lit_prune.calibration.calibration import Calibration
from lit_prune.structure.counting import count, unique_labels

if TYPE_CHECKING:
    from lit_prune.prunable import Prunable
    from lit_prune.pruning import PruningCallback


def planned(
    callback: PruningCallback,
    calibration: Calibration,
    target: float,
    shares: Sequence[float] | None = None,
) -> Plan:
    """The plan where scores do not decide how much goes from which layer.

    Args:
        callback: Says what was asked for.
        calibration: The model.
        target: Share of the present decoder's parameters to remove.
        shares: What each layer gives relative to the others.

    Raises:
        UserError: The target is out of reach.
    """
    plan = uniform(
        calibration.labels,
        calibration.structure.widths,
        target,
        callback.axes,
        protected=callback.protected_layers,
        stock=callback.stock,
        shares=shares,
    )
    return _aligned(callback, calibration, plan)


def planned_by(
    callback: PruningCallback, calibration: Calibration, scores: Scores, target: float
) -> Plan:
    """The plan where the lowest scores of the whole model go; see `planned`.

    Args:
        callback: Says what was asked for.
        calibration: The model.
        scores: Of its units.
        target: Share of the present decoder's parameters to remove.
    """
    widths, whole = calibration.structure.widths, callback.protected_layers
    plan = ranked(
        scores,
        calibration.labels,
        widths,
        target,
        callback.axes,
        protected=whole,
        per_parameter=not callback.standardised,
    )
    return _aligned(callback, calibration, plan)


def check_target(callback: PruningCallback, calibration: Calibration, target: float) -> None:
    """Refuse what no scores could make a plan for; see `planned`."""
    if callback.allocation != "global":
        planned(callback, calibration, target)
        return
    widths, whole = calibration.structure.widths, callback.protected_layers
    require_reachable(calibration.labels, widths, target, callback.axes, whole)


def free_share(pl_module: Prunable, protected: Sequence[int]) -> float:
    """Share of a dense decoder's parameters that is in the layers that are not protected.

    Args:
        pl_module: Has the model, which may have been cut since.
        protected: Layers that stay whole.
    """
    labels, dense = unique_labels(pl_module.model, pl_module.structure), pl_module.layout.of
    free = [label for label in labels if label.layer not in protected]
    return count(free, dense, decoder=True) / count(labels, dense, decoder=True)


def _aligned(callback: PruningCallback, calibration: Calibration, plan: Plan) -> Plan:
    """The same in widths that are multiples; of several cuts the last must come near."""
    labels, widths = calibration.labels, calibration.structure.widths
    found = aligned(plan, labels, widths, callback.multiple, same=callback.stock)
    if calibration.iteration + 1 >= callback.iterations:
        present = count(labels, widths, decoder=True)
        gone = 1 - present / callback.original.get("decoder", present)
        require_near(plan, found, callback.multiple, gone)
    return found
