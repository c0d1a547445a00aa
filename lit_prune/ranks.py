"""What the processes of a run decide together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_prune.errors import UserError
from lit_prune.layerwise import Ranks


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
