"""MINI-LLM's scores, with the gradient of one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.allocation.ranking import Scores
from lit_prune.calibration.statistics import InputStatistics
from lit_prune.cutting.layerwise import device_of, inputs_of, unit_scores
from lit_prune.gradients.folded import Rows, labels_of
from lit_prune.gradients.layerwise import layer_gradients
from lit_prune.gradients.spsa import GateNoise
from lit_prune.modes import evaluating
from lit_prune.scores.feature_map import Criterion, coupled, sensitivity
from lit_prune.scores.wanda import wanda_scores
from lit_prune.structure.coupling import ROLES, Part, parameter_names, parts, view
from lit_prune.structure.model import Structure

Batch = Mapping[str, Tensor]
#: Statistics of the inputs of modules, by path.
Statistics = Mapping[str, InputStatistics]


def scored_parts(model: nn.Module, structure: Structure, axes: Sequence[str]) -> list[list[Part]]:
    """What units of some axes own, for each layer."""
    roles = {role for axis in axes for role in ROLES[axis]}
    return [
        [part for part in parts(model, structure, layer) if part.role in roles]
        for layer in range(len(structure.widths.layers))
    ]


def together(
    samples: Sequence[tuple[int, Batch]],
    count: int,
    length: int,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor],
) -> Batch:
    """All processes' windows as one batch, the same for each of them.

    Args:
        samples: This process' windows [1, tokens], with their numbers.
        count: Windows of all processes.
        length: Tokens of a window.
        device: Where to put them.
        reduce: Sums a tensor over processes.

    Returns:
        `input_ids`, `attention_mask` and `labels`, [count, length], or fewer if there are not as
        many windows.
    """
    rows = torch.zeros(3, count, length, dtype=torch.long, device=device)
    for number, window in samples:
        parts = (window["input_ids"], window["attention_mask"], labels_of(window))
        for row, part in zip(rows[:, number], parts, strict=True):
            row[: part.shape[1]] = part[0]
    rows = reduce(rows)
    rows = rows[:, rows[1].any(1)]
    labels = rows[2].masked_fill(rows[1] == 0, -100)
    return {"input_ids": rows[0], "attention_mask": rows[1], "labels": labels}


def batches_of(batch: Batch, size: int) -> list[Batch]:
    """A batch in parts of some windows each, the last one of what is left."""
    starts = range(0, len(batch["input_ids"]), size)
    return [{name: x[start : start + size] for name, x in batch.items()} for start in starts]


@torch.no_grad()
def input_statistics(
    model: nn.Module,
    batches: Sequence[Batch],
    paths: Sequence[str],
    *,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> dict[str, InputStatistics]:
    """Statistics of modules' inputs in plain forward passes, nothing of which is kept.

    Args:
        model: A causal language model; its output head is left out.
        batches: `input_ids` and `attention_mask`, [batch, tokens]; padding does not count.
        paths: The modules.
        track: Wraps the batches in a progress bar.
    """
    modules = {path: model.get_submodule(path) for path in dict.fromkeys(paths)}
    found = {path: InputStatistics(inputs_of(m), device_of(m)) for path, m in modules.items()}
    base: Any = getattr(model, str(model.base_model_prefix))
    state: dict[str, Tensor | None] = {}

    def watch(statistics: InputStatistics) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows, mask = args[0].flatten(0, -2), state["mask"]
            statistics.add(rows if mask is None else rows[mask])

        return hook

    with evaluating(model), ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(watch(found[path])).remove)
        for batch in track(batches):
            device = next(model.parameters()).device
            mask = batch["attention_mask"].to(device)
            full = bool(mask.all())
            state["mask"] = None if full else mask.bool().flatten()
            base(
                input_ids=batch["input_ids"].to(device),
                attention_mask=None if full else mask,
                use_cache=False,
            )
    return found


@torch.no_grad()
def feature_map_scores(
    model: nn.Module,
    structure: Structure,
    axes: Sequence[str],
    statistics: Statistics | None,
    gradient: Callable[[str], Tensor] | None,
    criterion: Criterion = "fms",
) -> Scores:
    """Score units by the sensitivity of what they own; see `lit_prune.scores.feature_map`.

    Args:
        model: The model.
        structure: Its structure.
        axes: Axes of the layers.
        statistics: Of the inputs of every module that units own a part of, if it looks at them.
        gradient: Gives a parameter's gradient by name; called for one after the other.
        criterion: What is multiplied.
    """
    scores: Scores = {axis: [] for axis in axes}
    for layer, owned in enumerate(scored_parts(model, structure, axes)):
        rows: dict[str, Tensor] = {}
        for path in dict.fromkeys(part.path for part in owned):
            own = [part for part in owned if part.path == path]
            # a function of its own, so that nothing holds on to a gradient afterwards
            seen = None if statistics is None else statistics[path]
            rows |= _module(model, structure, layer, own, seen, gradient, criterion)
        for axis in axes:
            scores[axis].append(coupled(rows, axis).cpu())
    return scores


def _module(
    model: nn.Module,
    structure: Structure,
    layer: int,
    own: list[Part],
    statistics: InputStatistics | None,
    gradient: Callable[[str], Tensor] | None,
    criterion: Criterion,
) -> dict[str, Tensor]:
    """Rows' sums of sensitivities of the roles in one module."""
    names = parameter_names(model, own)
    weights = {name: model.get_parameter(name).detach() for name in names}
    slopes = norms = None
    if statistics is not None:
        found = _norms(model, own[0].path, statistics)
        norms = view(model, structure, layer, found, own)
    if gradient is not None:
        found = {name: gradient(name) for name in names}
        slopes = view(model, structure, layer, found, own)
    return _sums(
        view(model, structure, layer, weights, own),
        norms,
        slopes,
        criterion,
    )


def backprop_scores(
    model: nn.Module,
    structure: Structure,
    axes: Sequence[str],
    statistics: Statistics | None,
    batches: Sequence[Batch],
    criterion: Criterion = "fms",
    *,
    track: Callable[[Any], Iterator[Any]] = iter,
) -> Scores:
    """The same with back-propagated gradients of the mean loss, as in the paper's ablations.

    Batches go through the model one after the other, so that smaller ones take less memory.

    Args:
        model: The model.
        structure: Its structure.
        axes: Axes of the layers.
        statistics: Of the inputs of every module that units own a part of, if it looks at them.
        batches: `input_ids`, `attention_mask` and perhaps `labels`, [samples, tokens]; the loss is
            the mean over the tokens of all.
        criterion: What is multiplied.
        track: Wraps the layers' range in a progress bar.
    """
    owned = scored_parts(model, structure, axes)
    scores: Scores = {axis: [torch.empty(0)] * len(owned) for axis in axes}
    tokens = [int((labels_of(batch)[:, 1:] != -100).sum()) for batch in batches]
    sums: dict[str, Tensor] = {}

    def fold(batch: int, loss: float, layer: int, weights: Rows, gradients: Rows) -> None:
        share = tokens[batch] / max(sum(tokens), 1)
        for role in {part.role for part in owned[layer]}:
            slope = gradients[role].float() * share
            sums[role] = sums[role].add_(slope) if role in sums else slope

    def finish(layer: int, weights: Rows) -> None:
        norms: Rows | None = None
        if statistics is not None:
            norms = {}
            for part in owned[layer]:
                values = _norms(model, part.path, statistics[part.path])
                norms |= view(model, structure, layer, values, [part])
        rows = _sums({role: weights[role] for role in sums}, norms, sums, criterion)
        sums.clear()
        for axis in axes:
            scores[axis][layer] = coupled(rows, axis).cpu()

    layer_gradients(model, structure, batches, fold, finish, track=track)
    return scores


@torch.no_grad()
def gate_scores(
    model: nn.Module,
    structure: Structure,
    axes: Sequence[str],
    statistics: Statistics,
    noise: GateNoise,
    slopes: Tensor,
) -> Scores:
    """Score units by their gates' gradient and the Wanda score of their columns: |g| S.

    Args:
        model: The model.
        structure: Its structure.
        axes: Axes of the layers.
        statistics: Of the inputs of the modules that read units.
        noise: What the gates were perturbed with.
        slopes: c of every sample, [samples].
    """
    scores: Scores = {axis: [] for axis in axes}
    for layer in range(len(structure.widths.layers)):
        for axis in axes:
            path = structure.readers(model, axis, layer)[0].path
            reader, seen = model.get_submodule(path), statistics[path]
            columns = unit_scores(structure, layer, axis, reader, seen, wanda_scores)
            scores[axis].append(noise.gradient(layer, axis, slopes).abs() * columns)
    return scores


def _norms(model: nn.Module, path: str, statistics: InputStatistics) -> dict[str, Tensor]:
    """The norm of the input of every entry of a module's parameters, by name; nothing is copied."""
    module, norms = model.get_submodule(path), statistics.norms()
    shape = module.get_parameter("weight").shape
    norms = norms[:, None] if isinstance(module, Conv1D) else norms
    found = {f"{path}.weight": norms.expand(shape)}
    if (bias := getattr(module, "bias", None)) is not None:
        found[f"{path}.bias"] = norms.new_tensor(statistics.tokens).sqrt().expand(bias.shape)
    return found


def _sums(
    weights: Mapping[str, Tensor],
    norms: Mapping[str, Tensor] | None,
    gradients: Mapping[str, Tensor] | None,
    criterion: Criterion,
) -> dict[str, Tensor]:
    """Each row's sum of sensitivities, by role."""
    return {
        role: sensitivity(
            weight,
            None if norms is None else norms[role],
            None if gradients is None else gradients[role],
            criterion,
        ).sum(-1)
        for role, weight in weights.items()
    }
