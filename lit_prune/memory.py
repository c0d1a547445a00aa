"""Running out of memory: telling it from other errors, and going on with half as much at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.notes import note

Batch = Mapping[str, Tensor]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in the CPU's allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_oom_error(error)


def fits(action: Callable[[], object]) -> bool:
    """Do something unless memory runs out; what it took is then given back.

    Args:
        action: Must leave nothing half done where it may run out of memory.

    Returns:
        Whether it was done.
    """
    try:
        action()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False  # with the error goes what its frames held
    return True


def halves(batch: Batch) -> list[Batch]:
    """A batch that memory ran out with, in two, the first perhaps one window larger; says so.

    Args:
        batch: Tensors [batch, tokens].

    Raises:
        UserError: It has a single window.
    """
    windows, tokens = batch["input_ids"].shape
    if windows < 2:
        raise UserError(
            f"expected memory for a calibration window of {tokens} tokens, got too little even for "
            "a single one; lower the method's length, or use --model.dtype bfloat16"
        )
    first = (windows + 1) // 2
    note(
        f"memory ran out with {windows} calibration windows of {tokens} tokens at once; went on "
        f"with {first}, so that the result is that of a smaller batch_size up to rounding",
        own=True,
    )
    parts = {name: value.split(first) for name, value in batch.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(2)]


def in_halves(batches: Sequence[Batch], run: Callable[[Batch], object]) -> None:
    """Call a function with each batch, in their order; what is too large for memory is halved.

    Args:
        batches: Tensors [batch, tokens].
        run: As for `fits`.

    Raises:
        UserError: A single window is too large.
    """
    waiting = list(batches)
    while waiting:
        batch = waiting.pop(0)
        if not fits(lambda batch=batch: run(batch)):
            waiting[:0] = halves(batch)


def shown(see: Callable[[Tensor], None], rows: Tensor) -> None:
    """Show activations to a function, in halves if memory runs out in it.

    Args:
        see: As for `fits`; takes any number of rows.
        rows: [tokens, features].

    Raises:
        UserError: A single row is too large.
    """
    if fits(lambda: see(rows)):
        return
    if len(rows) < 2:
        raise UserError(
            f"expected memory for statistics of {rows.shape[-1]} features, got too little even for "
            "a single token; cut fewer axes at once or free some memory"
        )
    first = (len(rows) + 1) // 2
    note(
        f"memory ran out in statistics of {len(rows)} tokens at once; went on with {first}",
        own=True,
    )
    for part in rows.split(first):
        shown(see, part)
