"""What the processes of a run decide together."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from lit_prune.cutting.layerwise import Ranks
from lit_prune.errors import UserError
from lit_prune.structure import Layout


def ranks_of(strategy: Any) -> Ranks:
    """Sums and decisions over the processes of a Lightning strategy.

    Args:
        strategy: The trainer's strategy.

    Raises:
        UserError: The strategy leaves the main process with the unpruned model.
    """
    launcher = getattr(strategy, "_start_method", None)
    if launcher in {"spawn", "fork", "forkserver"}:
        raise UserError(
            f"expected the ddp strategy for several devices, got ddp_{launcher}, which would leave "
            "the main process with the unpruned model; use --trainer.strategy ddp"
        )

    def reduce(tensor: Tensor) -> Tensor:
        return strategy.reduce(tensor, reduce_op="sum")

    def agree(decision: dict[str, Tensor]) -> dict[str, Tensor]:
        return strategy.broadcast(decision)

    def gather(tensor: Tensor) -> list[Tensor]:
        alone = getattr(strategy, "world_size", 1) == 1
        return [tensor] if alone else list(strategy.all_gather(tensor))

    return Ranks(reduce, agree, gather)


def require_same(strategy: Any, layout: Layout) -> None:
    """Refuse to go on if processes were cut differently, which DDP would not notice.

    DDP gives every process the first one's weights, so that units which only some of them have kept
    would be swapped without an error where their number is equal.

    Args:
        strategy: The trainer's strategy.
        layout: What stays on this process.

    Raises:
        UserError: It is not the same on all processes.
    """
    if getattr(strategy, "world_size", 1) == 1:
        return
    content = json.dumps(layout.to_dict(), sort_keys=True).encode()
    own = torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
    found = [bytes(row.tolist()) for row in strategy.all_gather(own.to(strategy.root_device))]
    other = [str(rank) for rank, digest in enumerate(found) if digest != found[0]]
    if other:
        raise UserError(
            "expected every process to keep the same units as rank 0, got others on rank "
            f"{', '.join(other)}; decide on one rank and broadcast, as Ranks.agree does"
        )
