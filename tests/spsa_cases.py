"""Windows, losses and directions for tests of zeroth-order gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
BOTH = ("group", "channel")


def samples(count: int, length: int = 12, seed: int = 0) -> list[tuple[int, Batch]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (count, 1, length), generator=generator)
    batches = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
    return list(enumerate(batches))


def loss(model: Any, batch: Batch) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    flat = [torch.cat([x.flatten() for x in tensors]) for tensors in (a, b)]
    return float(torch.nn.functional.cosine_similarity(flat[0], flat[1], 0))
