"""FASP as a slow reference: columns of the dense model are zeroed and restored, nothing is cut."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.allocation.plan import Plan
from lit_prune.cutting.layerwise import Restoration
from lit_prune.structure import Structure

Batch = dict[str, Tensor]


def columns(model: nn.Module, path: str) -> Tensor:
    """A linear module's weight as [outputs, inputs], to be written to."""
    module = model.get_submodule(path)
    weight = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight


def inputs_of(model: Any, path: str, data: list[Batch]) -> Tensor:
    """What a module reads in plain forward passes of the whole model, [tokens, features]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2))
    )
    with torch.no_grad():
        for batch in data:
            model(input_ids=batch["input_ids"], use_cache=False)
    handle.remove()
    return torch.cat(seen)


def literal(
    model: Any, structure: Structure, plan: Plan, data: list[Batch], restoration: Restoration
) -> list[dict[str, list[Any]]]:
    """Zero the columns that go, layer by layer, and restore the others; the kept units."""
    result = []
    for layer, sizes in enumerate(structure.widths.layers):
        kept_units: dict[str, list[Any]] = {}
        for axis in ("group", "query", "channel"):
            count = plan.removed.get(axis, [0, 0, 0])[layer]
            if not count:
                continue
            path = structure.readers(model, axis, layer)[0].path
            x, weight = inputs_of(model, path, data), columns(model, path)
            scores = [
                float(x[:, j].square().sum().sqrt() * weight[:, j].abs().sum())
                for j in range(x.shape[1])
            ]
            units = list(range(x.shape[1]))  # the unit of each column
            if axis != "channel":
                head = sizes["value"] * (sizes["query"] if axis == "group" else 1)
                units = [j // head for j in range(x.shape[1])]
            totals = dict.fromkeys(units, 0.0)
            for unit, score in zip(units, scores, strict=True):
                totals[unit] += score
            gone: set[int] = set()
            per = sizes["query"] if axis == "query" else len(totals)
            for first in range(0, len(totals), per):  # the same number from each group
                gone |= set(sorted(range(first, first + per), key=totals.__getitem__)[:count])
            stay = [u for u in sorted(totals) if u not in gone]
            kept_units[axis] = stay
            if axis == "query":
                rows = itertools.groupby(stay, key=lambda u: u // per)
                kept_units[axis] = [[u % per for u in row] for _, row in rows]
            keep = [j for j, unit in enumerate(units) if unit not in gone]
            new = restored(weight, x, keep, restoration)
            weight.zero_()
            weight[:, keep] = new
        result.append(kept_units)
    return result


def restored(weight: Tensor, x: Tensor, keep: list[int], how: Restoration) -> Tensor:
    """Equation 8 of FASP with an inverse, or our ridge; x is [tokens, features]."""
    if how.kind == "none":
        return weight[:, keep].clone()
    x = x.T
    removed = [j for j in range(len(x)) if j not in keep]
    square = x[keep] @ x[keep].T
    mean = sum(float(square[i, i]) for i in range(len(keep))) / len(keep)
    inverse = torch.linalg.inv(square + how.delta * mean * torch.eye(len(keep), dtype=x.dtype))
    if how.ridge == "zero":
        return weight @ x @ x[keep].T @ inverse
    return weight[:, keep] + weight[:, removed] @ x[removed] @ x[keep].T @ inverse
