"""The index algebra written out entry by entry, and random cases of it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

#: A dimension as nested tuples: ("name", axis), ("number", n), ("product" | "sum", parts…).
Tree = tuple[Any, ...]
PLAIN = ("channel", "hidden", "head_dim", "group")
WITHIN_GROUPS = ("query", "value")


def text_of(tree: Tree, nested: bool = False) -> str:
    """A tree in the language of the table of families."""
    kind, *parts = tree
    if kind in ("name", "number"):
        return str(parts[0])
    inner = (" " if kind == "product" else " + ").join(text_of(part, True) for part in parts)
    return f"({inner})" if nested or kind == "product" else inner


def entries(tree: Tree, sizes: dict[str, int]) -> list[dict[str, int]]:
    """The coordinates of every entry, in order: slowest factor first, segments in turn."""
    kind, *parts = tree
    if kind == "name":
        return [{parts[0]: i} for i in range(sizes[parts[0]])]
    if kind == "number":
        return [{} for _ in range(parts[0])]
    lists = [entries(part, sizes) for part in parts]
    if kind == "sum":
        return [entry for part in lists for entry in part]
    return [
        {axis: i for entry in combination for axis, i in entry.items()}
        for combination in itertools.product(*lists)
    ]


def stays(entry: dict[str, int], keep: dict[str, Tensor]) -> bool:
    """Whether an entry stays: on every axis its unit is kept, for `query` that of its group."""
    for axis, unit in entry.items():
        if axis not in keep:
            continue
        if axis not in WITHIN_GROUPS:
            kept = keep[axis].tolist()
        else:
            groups = keep["group"].tolist() if "group" in keep else list(range(len(keep[axis])))
            if entry["group"] not in groups:
                return False
            kept = keep[axis][groups.index(entry["group"])].tolist()
        if unit not in kept:
            return False
    return True


@st.composite
def trees(
    draw: st.DrawFn, free: frozenset[str] = frozenset(PLAIN), group: bool = False, depth: int = 2
) -> Tree:
    """Dimensions in which no product has an axis twice, and `query` stands beside its group."""
    kinds = ["leaf"] if not depth else ["leaf", "product", "product", "sum"]
    kind = draw(st.sampled_from(kinds))
    if kind == "leaf":
        names = sorted(free | (set(WITHIN_GROUPS) & free if group else set()))
        if names and draw(st.integers(0, 3)):
            return ("name", draw(st.sampled_from(names)))
        return ("number", draw(st.integers(1, 3)))
    if kind == "sum":
        return ("sum", *(draw(trees(free, group, depth - 1)) for _ in range(draw(st.just(2)))))
    parts: list[Tree] = []
    if "group" in free and draw(st.booleans()):
        parts.append(("name", "group"))
        free, group = (free - {"group"}) | set(WITHIN_GROUPS), True
    for _ in range(draw(st.integers(1, 2))):
        parts.append(draw(trees(free, group, depth - 1)))
        free -= axes_of(parts[-1])
    parts = draw(st.permutations(parts))
    return ("product", *parts) if len(parts) > 1 else parts[0]


def axes_of(tree: Tree) -> set[str]:
    kind, *parts = tree
    if kind == "name":
        return {parts[0]}
    return set() if kind == "number" else {axis for part in parts for axis in axes_of(part)}


SIZES = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in (*PLAIN, *WITHIN_GROUPS)})


@st.composite
def keeps(draw: st.DrawFn, sizes: dict[str, int], axes: tuple[str, ...]) -> dict[str, Tensor]:
    """Kept units of some axes; different ones in each group, equal in number."""

    def subset(n: int, count: int) -> list[int]:
        return sorted(draw(st.permutations(range(n)))[:count])

    keep: dict[str, Tensor] = {}
    for axis in sorted(axes, key=WITHIN_GROUPS.__contains__):  # groups come first
        if not draw(st.booleans()):
            continue
        count = draw(st.integers(1, sizes[axis]))
        if axis in WITHIN_GROUPS:
            groups = len(keep["group"]) if "group" in keep else sizes["group"]
            keep[axis] = torch.tensor([subset(sizes[axis], count) for _ in range(groups)])
        else:
            keep[axis] = torch.tensor(subset(sizes[axis], count))
    return keep
