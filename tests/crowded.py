"""Stands in for a device that is too small: layers that run out of memory with many windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.structure import Structure

#: What PyTorch says when the CPU's allocator fails.
CPU_MESSAGE = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"

#: Tokens of a window.
TOKENS = 12


def windows(number: int = 8, padded: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 61, (number, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, number, 2):
        if padded == "right":
            mask[row, TOKENS - row :] = 0
        elif padded == "left":
            mask[row, :row] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def batches(size: int, padded: str = "") -> list[dict[str, Tensor]]:
    parts = {name: value.split(size) for name, value in windows(padded=padded).items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(-(-8 // size))]


@contextmanager
def crowded(
    model: Any,
    most: int,
    part: str = "ffn",
    layer: int = 1,
    *,
    window: int = 0,
    error: type[Exception] = torch.OutOfMemoryError,
) -> Iterator[list[int]]:
    """Within the context a part of a layer fails with too many windows at once.

    Args:
        model: The model.
        most: Windows that it can take.
        part: ``ffn`` or ``attention`` fail before their last matrix, ``layer`` before the first.
        layer: The layer.
        window: Tokens of a window, for families that flatten batches.
        error: What is raised.

    Yields:
        The number of windows of each failure.
    """
    failures: list[int] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        windows = len(x) if x.dim() == 3 else len(x) // window
        if windows > most:
            failures.append(windows)
            message = CPU_MESSAGE if error is RuntimeError else "out of memory"
            raise error(message)

    structure = Structure.of(model)
    place: nn.Module = structure.layers(model)[layer]
    if part != "layer":
        axis = "channel" if part == "ffn" else "group"
        place = model.get_submodule(structure.readers(model, axis, layer)[0].path)
    # behind all other hooks
    handle = place.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield failures
    finally:
        handle.remove()
