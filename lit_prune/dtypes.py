"""Types of numbers: their names, and keeping those that a cast must not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lit_prune.recovery import lora

#: Names for the command line; ``auto`` stands for whatever a checkpoint or model has.
DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def keeping_dtypes(model: nn.Module) -> Iterator[None]:
    """Computed buffers and adapters of a model that is moved or cast keep their dtype.

    A cast to bfloat16 would round rotary frequencies, and the logits would then differ from those
    of the exported checkpoint, which computes them anew. Adapters have a dtype of their own.
    """
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None
    ]
    adapters = [(parameter, parameter.data) for parameter in lora.lora_parameters(model)]
    yield
    for module, name, buffer in buffers:
        new = module._buffers[name]
        if new is not None and new.dtype != buffer.dtype:
            module._buffers[name] = buffer.to(new.device)
    for parameter, data in adapters:
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
