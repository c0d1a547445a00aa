"""What a fit logs over its steps, kept for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Points of a metric at most; beyond, those that stand closest are left out.
MOST_POINTS = 500
#: metric -> [[step, value], ...], plain types.
Points = dict[str, list[list[Any]]]


def add_values(points: Points, step: int, values: Mapping[str, Any]) -> None:
    """Add a step's values; the result follows from the values alone, not from when it is saved.

    Args:
        points: Gets them. A value that is not finite is None there.
        step: Optimizer steps before them.
        values: metric -> a number or a tensor with one element.
    """
    for name, value in values.items():
        number = float(value)
        curve = points.setdefault(name, [])
        curve.append([step, number if math.isfinite(number) else None])
        if len(curve) > MOST_POINTS:
            _thin(curve)


def fresh(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Logged values that are new: Lightning goes on showing the last value of a stale key.

    Args:
        before: `trainer.logged_metrics` when a batch began; holding on to it keeps its memory from
            being used again.
        after: The same when it ended.
    """
    return {k: v for k, v in after.items() if k not in before or not _is(v, before[k])}


def _is(one: Any, other: Any) -> bool:
    """Whether two are one value, not an equal one."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.data_ptr() == other.data_ptr()
    return one is other


def _thin(curve: list[list[Any]]) -> None:
    """Leave out the inner point whose neighbours are closest; the first of several such."""
    inner = range(1, len(curve) - 1)
    curve.pop(min(inner, key=lambda i: curve[i + 1][0] - curve[i - 1][0]))
