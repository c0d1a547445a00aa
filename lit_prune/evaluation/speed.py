"""How fast models are, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_prune.modes import evaluating


def throughput(
    models: Mapping[str, nn.Module], input_ids: Tensor, rounds: int = 5
) -> dict[str, list[float]]:
    """Tokens a second of a forward pass, the models taking turns.

    Taking turns spreads a disturbance of the machine over all models; each has a warm-up first.

    Args:
        models: Name -> causal LM.
        input_ids: Tokens [batch, length] of every pass.
        rounds: Passes per model.

    Returns:
        Name -> tokens/s of each round.
    """
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            device = next(model.parameters()).device
            tokens = input_ids.to(device)
            with evaluating(model), torch.no_grad():
                _synchronize(device)
                start = time.perf_counter()
                model(input_ids=tokens, use_cache=False)
                _synchronize(device)
            if number:
                speeds[name].append(tokens.numel() / (time.perf_counter() - start))
    return speeds


def median_speed(speeds: Sequence[float]) -> float:
    """The middle of `throughput`'s rounds, tokens/s."""
    return statistics.median(speeds)


def _synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue, so that the clock measures the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
