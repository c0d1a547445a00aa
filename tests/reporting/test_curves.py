"""What is kept of what a fit logs."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch

from lit_prune.reporting.curves import MOST_POINTS, Points, add_values, fresh


def test_values_are_kept_as_plain_numbers():
    points: Points = {}
    add_values(points, 3, {"loss": torch.tensor(1.5), "rate": 2})
    add_values(points, 4, {"loss": torch.tensor(math.nan)})
    assert points == {"loss": [[3, 1.5], [4, None]], "rate": [[3, 2.0]]}
    assert type(points["loss"][0][1]) is float


def test_curves_are_thinned_evenly_and_alike_after_a_break():
    points: Points = {}
    saved: Any = None
    for step in range(0, 9000, 3):
        add_values(points, step, {"loss": step / 7})
        if step == 4200:
            saved = copy.deepcopy(points)
    curve = points["loss"]
    assert len(curve) == MOST_POINTS
    assert (curve[0][0], curve[-1][0]) == (0, 8997)
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(curve)]
    assert max(gaps[:-1]) <= 4 * min(gaps[:-1])
    assert all(value == step / 7 for step, value in curve)
    for step in range(4203, 9000, 3):
        add_values(saved, step, {"loss": step / 7})
    assert saved == points


def test_only_new_values_count():
    stale, same = torch.tensor(1.0), torch.tensor(2.0)
    before = {"old": stale, "logged": same}
    after = {"old": stale.detach(), "logged": same.clone(), "new": torch.tensor(3.0)}
    assert set(fresh(before, after)) == {"logged", "new"}
    assert set(fresh({"a": 1.0, "b": 2.5}, {"a": before, "b": 2.5})) == {"a"}
