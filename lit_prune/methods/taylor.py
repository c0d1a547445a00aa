"""Taylor scores of a model's units from calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lit_prune.allocation.ranking import Scores
from lit_prune.gradients.folded import labels_of, weight_gradients
from lit_prune.gradients.layerwise import layer_gradients
from lit_prune.scores.taylor import BY_ENTRY, Estimate, Reduction, TaylorSums, Weighting
from lit_prune.structure.coupling import names_of, view
from lit_prune.structure.model import Structure

#: What second-order terms are multiplied with: 1, or the tokens that a sample's mean loss is over.
FisherScale = Literal["mean", "tokens"]


def taylor_scores(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Mapping[str, Tensor]],
    estimates: Sequence[Estimate],
    axes: Sequence[str],
    *,
    reduction: Reduction = "sum",
    weighting: Weighting = "uniform",
    fisher_scale: FisherScale = "mean",
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> dict[Estimate, Scores]:
    """Score units by Taylor estimates; see `lit_prune.scores.taylor` for the formulas.

    Each batch is a sample. Where an estimate needs sums for each entry, gradients come layer by
    layer, so that there are sums for one layer at a time (see `lit_prune.gradients.layerwise`);
    else sample by sample, in one sweep over the model.

    Squared gradients of a mean over T tokens are about T times smaller than its Hessian:
    ``fisher_scale="tokens"`` multiplies second-order terms with T.

    Args:
        model: A causal language model.
        structure: Its structure.
        batches: This process's batches; may be empty.
        estimates: Which estimates.
        axes: Axes whose units are scored.
        reduction: Over the structures of a unit.
        weighting: How much a sample counts.
        fisher_scale: Scale of second-order terms.
        reduce: Sums a tensor over processes.
        track: Wraps what is gone through in a progress bar.

    Returns:
        Estimate -> axis -> scores of each layer's units.

    Raises:
        UserError: A loss is not finite.
    """
    scales = None
    if fisher_scale == "tokens":
        scales = [float((labels_of(batch)[:, 1:] != -100).sum()) for batch in batches]
    sums = TaylorSums(
        estimates, axes, reduction=reduction, weighting=weighting, scales=scales, reduce=reduce
    )
    if any(estimate in BY_ENTRY for estimate in estimates):
        layer_gradients(model, structure, batches, sums.fold, sums.finish, track=track)
        return sums.result()
    weight_gradients(model, structure, batches, sums.fold, track=track)
    for layer in range(len(structure.widths.layers)):
        names = names_of(model, structure, layer)
        tensors = {name: model.get_parameter(name).detach() for name in names}
        sums.finish(layer, view(model, structure, layer, tensors))
    return sums.result()
