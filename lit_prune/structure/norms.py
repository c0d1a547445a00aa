"""What a narrower residual stream changes in norms and scaled embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_prune.structure.configs import epsilon
from lit_prune.structure.model import Structure


def rescale(model: nn.Module, structure: Structure, before: int) -> None:
    """Correct RMS norms and scaled embeddings after `hidden` was cut.

    An RMS norm divides by the mean over fewer features: with d of them before and d' after, its
    effective weight times sqrt(d/d') and its epsilon times d/d' give what masking gave. A family
    that multiplies its embedding by sqrt(hidden size) gets an embedding larger by sqrt(d/d'), and
    a final norm smaller by that if the output head is tied to it. LayerNorms stay as they are.

    Args:
        model: The cut model.
        structure: Its structure, with the new widths.
        before: The hidden size before the cut.
    """
    family = structure.family
    if family.norm == "layer":
        return
    config: Any = model.config
    hidden = structure.widths.shared["hidden"]
    ratio = before / hidden
    plus_one = family.norm == "rms_plus_one"
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    tied = head is not None and head.weight is embedding.weight
    for site in structure.sites(model):
        if site.line.reads is not None or site.line.writes.name != "hidden":
            continue
        factor = math.sqrt(ratio)
        if family.scaled_embedding and tied and site.layer is None:
            factor = 1.0
        weight = model.get_submodule(site.path).get_parameter("weight")
        weight.data.copy_(_scaled(weight.data, factor, plus_one))
    for module in model.modules():
        # the config has one epsilon, so norms over a head's features follow it too
        for name in ("variance_epsilon", "eps"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, epsilon(config, family, hidden))
    if family.scaled_embedding:
        embedding.weight.data.mul_(math.sqrt(ratio))
        embedding.scalar_embed_scale = hidden**0.5
        embedding.embed_scale = torch.full_like(embedding.embed_scale, embedding.scalar_embed_scale)


def _scaled(weight: Tensor, factor: float, plus_one: bool) -> Tensor:
    offset = 1.0 if plus_one else 0.0
    return (weight.float() + offset) * factor - offset
