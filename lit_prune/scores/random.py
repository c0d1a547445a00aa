"""Scores without meaning, as the least that any other must beat; and numbers drawn by name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_prune.structure.dims import PER_GROUP
from lit_prune.structure.layout import Widths


def generator_for(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator that starts at the same place in every process, for keys that are equal.

    Args:
        device: Where it draws; other kinds of devices draw other numbers.
        key: What the numbers are for, such as a seed and a name.
    """
    return torch.Generator(device).manual_seed(_number(*key))


def seed_of(seed: int, turn: int) -> int:
    """A seed for each turn of what is drawn again and again; that of the first is the seed itself.

    Args:
        seed: The seed that was asked for.
        turn: Number of the turn, from 0.

    Returns:
        A number that no other seed and turn have but by chance.
    """
    return _number("turn", seed, turn) if turn else seed


def _number(*key: int | str) -> int:
    """A number of 63 bits for a key."""
    # hashed, as the CPU's generator takes only the lowest 32 bits of a seed; Python's own hash of a
    # string differs between processes
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def random_scores(widths: Widths, axes: Sequence[str], seed: int) -> dict[str, list[Tensor]]:
    """Draw each unit's score evenly from [0, 1), on the CPU: the same for every process and device.

    Args:
        widths: Sizes of the axes.
        axes: Axes of the layers, or ``hidden``.
        seed: Fixes the scores; an axis has the same ones whatever others are asked for.

    Returns:
        For each axis a tensor for each layer, [units], or [groups, units] for `query` and `value`,
        and for `hidden` one tensor [hidden]; float32.
    """
    scores = {}
    for axis in axes:
        generator = generator_for("cpu", "random", seed, axis)
        scores[axis] = [
            torch.rand(_shape(axis, sizes), generator=generator, dtype=torch.float32, device="cpu")
            for sizes in ([widths.shared] if axis == "hidden" else widths.layers)
        ]
    return scores


def _shape(axis: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return (sizes["group"], sizes[axis]) if axis in PER_GROUP else (sizes[axis],)
