"""What a narrower residual stream changes in norms and scaled embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_prune.errors import UserError
from lit_prune.modes import evaluating
from lit_prune.structure.model import Site, Structure

#: What the weights of RMS norms are multiplied by when `hidden` is cut; see `rescale`.
NormRescale = Literal["masked", "none", "calibrated"]
#: What norms of transformers call their epsilon.
_EPSILONS = ("variance_epsilon", "eps")


def rescale(
    model: nn.Module,
    structure: Structure,
    before: int,
    mode: NormRescale = "masked",
    shares: Mapping[str, float] | None = None,
) -> None:
    """Correct RMS norms and scaled embeddings after `hidden` was cut.

    An RMS norm divides by the mean over fewer features, d' instead of d. Its effective weight is
    multiplied by

    - `masked`: sqrt(d/d'), and its epsilon by d/d': it computes what it did when the other
      features were zeroed;
    - `none`: nothing, nor is its epsilon: a norm over the features that are left;
    - `calibrated`: sqrt(s d/d') with the share s of its input's energy that is left: it computes
      what it did before, as far as that share is the same for every token. Its epsilon follows as
      for masking (s ε d/d' would be exact, but the config has one epsilon for all norms).

    A family that multiplies its embedding by sqrt(hidden size) gets an embedding larger by
    sqrt(d/d') in each mode, so that the stream is as it was, and a final norm smaller by that
    where the output head is tied to it. LayerNorms stay as they are.

    Args:
        model: The cut model.
        structure: Its structure, with the new widths.
        before: The hidden size before the cut.
        mode: What norms do.
        shares: For `calibrated` the share s of each norm's path, as of `kept_shares`.
    """
    family = structure.family
    if family.norm == "layer":
        return
    hidden = structure.widths.shared["hidden"]
    ratio = before / hidden
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    tied = head is not None and head.weight is embedding.weight
    for site in stream_norms(model, structure):
        factor = 1.0 if mode == "none" else math.sqrt(ratio)
        if mode == "calibrated" and shares is not None:
            factor *= math.sqrt(shares[site.path])
        if family.scaled_embedding and tied and site.layer is None:
            factor /= math.sqrt(ratio)
        weight = model.get_submodule(site.path).get_parameter("weight")
        weight.data.copy_(_scaled(weight.data, factor, family.norm == "rms_plus_one"))
    epsilon = norm_epsilon(model, structure)
    if mode != "none" and epsilon is not None:
        set_norm_epsilon(model, structure, epsilon * ratio)
    if family.scaled_embedding:
        embedding.weight.data.mul_(math.sqrt(ratio))
        embedding.scalar_embed_scale = hidden**0.5
        embedding.embed_scale = torch.full_like(embedding.embed_scale, embedding.scalar_embed_scale)


def stream_norms(model: nn.Module, structure: Structure) -> Iterator[Site]:
    """Yield the norms over the residual stream's features."""
    for site in structure.sites(model):
        if site.line.reads is None and site.line.writes.name == "hidden":
            yield site


def norm_epsilon(model: nn.Module, structure: Structure) -> float | None:
    """The epsilon of a model's RMS norms, or None if it has LayerNorms."""
    if structure.family.norm == "layer":
        return None
    norm = vars(model.get_submodule(next(stream_norms(model, structure)).path))
    return next(norm[name] for name in _EPSILONS if name in norm)


def set_norm_epsilon(model: nn.Module, structure: Structure, epsilon: float | None) -> None:
    """Set the epsilon of a model's RMS norms; see `norm_epsilon`."""
    if structure.family.norm == "layer" or epsilon is None:
        return
    for module in model.modules():
        # the config has one epsilon, so norms over a head's features follow it too
        for name in _EPSILONS:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, epsilon)


@torch.no_grad()
def energies(
    model: nn.Module, structure: Structure, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Sum of squares of each residual feature at the input of each RMS norm.

    Padded tokens are left out. The sums of several processes can be added.

    Args:
        model: A causal language model; it runs in eval mode.
        structure: Its structure.
        batches: Batches with `input_ids` and `attention_mask`, [batch, tokens].

    Returns:
        For each norm over the stream its path and the sums, float32 [hidden]; nothing for a family
        with LayerNorms, which `rescale` leaves as they are.
    """
    if structure.family.norm == "layer":
        return {}
    paths = [site.path for site in stream_norms(model, structure)]
    device = next(model.parameters()).device
    hidden = structure.widths.shared["hidden"]
    # not the default dtype, which a bf16-true trainer sets
    zeros = torch.zeros(hidden, dtype=torch.float32, device=device)
    totals = {path: zeros.clone() for path in paths}
    tokens: Tensor | None = None

    def make_hook(total: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if tokens is None else args[0][tokens]
            total.add_(x.detach().float().square().flatten(0, -2).sum(0).to(total.device))

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(make_hook(total))
        for path, total in totals.items()
    ]
    base: Any = getattr(model, str(model.base_model_prefix))
    try:
        with evaluating(model):
            for batch in batches:
                mask = batch["attention_mask"].to(device)
                tokens = mask.bool()
                ids = batch["input_ids"].to(device)
                base(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def kept_shares(
    model: nn.Module,
    structure: Structure,
    kept: Tensor,
    mode: NormRescale,
    energies: Mapping[str, Tensor] | None,
) -> dict[str, float]:
    """The share of each norm's energy that a cut leaves.

    Args:
        model: The model before the cut.
        structure: Its structure.
        kept: Residual features that stay, [kept].
        mode: As for `rescale`; only `calibrated` needs shares.
        energies: As of `energies`.

    Returns:
        A share for each norm's path, 1 where there is no energy at all.

    Raises:
        UserError: The mode is unknown, or energies are missing, of another size or not finite.
    """
    if mode not in get_args(NormRescale):
        names = ", ".join(get_args(NormRescale))
        raise UserError(f"expected norm_rescale out of {names}, got {mode!r}; choose one of those")
    if mode != "calibrated" or structure.family.norm == "layer":
        return {}
    shares = {}
    for site in stream_norms(model, structure):
        energy = (energies or {}).get(site.path)
        if energy is None or energy.shape != (structure.widths.shared["hidden"],):
            found = "none" if energy is None else f"shape {tuple(energy.shape)}"
            raise UserError(
                f"expected an energy of each residual feature at {site.path} for norm_rescale "
                f"calibrated, got {found}; measure them on this very model"
            )
        total = energy.sum().item()
        if not math.isfinite(total):
            raise UserError(
                f"expected finite calibration activations, got NaN or infinity at the input of "
                f"{site.path}; check the model's weights, or use --model.dtype float32"
            )
        shares[site.path] = energy[kept.to(energy.device)].sum().item() / total if total else 1.0
    return shares


def _scaled(weight: Tensor, factor: float, plus_one: bool) -> Tensor:
    offset = 1.0 if plus_one else 0.0
    return (weight.float() + offset) * factor - offset
